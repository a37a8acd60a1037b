"""The table of sizes: formulas by hand, the choice of a mesh, and what is written.

That the formulas are right is tested against compiled steps, in `tests/on_devices`.
"""

import csv
import dataclasses
from pathlib import Path

import pytest

from experiments import _roofline, sizing
from experiments._chips import CHIPS, Chip
from experiments._sizing import Exchange, Split, Step, form
from sae_jax import RULES, SAE, Recipe, settings
from sae_jax.binding import bind

SLOW = Chip(1e9, 100.0, 50.0, 10.0, 5.0, 64, in_host=4, sends_far=1.0)


def step(rule="topk(k=8)", split=(4, 2), batch=512, **recipe):
    return Step(SAE(64, 4096, rule), batch, Recipe(**recipe), Split(*split))


# Formulas


def test_only_budgets_of_a_row_have_sparse_codes_on_a_mesh():
    """Others are told apart by asking them; a rule of a user's own as well."""
    found = {
        name: form(SAE(8, 4096, bind(RULES[name], RULES[name].example))).slots
        for name in RULES
        if not name.startswith("toy_")
    }
    of_rows = ("topk", "gradient_topk", "variational", "matching_pursuit")
    assert [found.pop(name) for name in of_rows] == [4] * len(of_rows)
    assert set(found.values()) == {0}
    assert form(SAE(8, 64, "topk(k=8)")).slots == 0, "too many of so few"


def test_the_state_of_one_device_by_hand():
    whole, part = step(split=(8, 1)).state(), step(split=(1, 8)).state()
    assert whole["parameters"] == 4 * (2 * 64 * 4096 + 4096 + 64)
    assert part["parameters"] == 4 * (2 * 64 * 512 + 512 + 64)
    assert part["moments"] == 2 * part["parameters"] + 8  # two counts of steps
    assert part["counters"] == 4 * 512 + 4 * 3 + 8  # idle; step, control, diverged; key


def test_a_ring_sends_all_but_its_own_share_and_sums_twice():
    assert Exchange("", "all-gather", "data", 4, 100).sent == 75
    assert Exchange("", "all-reduce", "data", 4, 100).sent == 150


def test_an_axis_of_one_device_sends_nothing():
    assert {e.axis for e in step(split=(8, 1)).exchanges()} == {"data"}
    assert {e.axis for e in step(split=(1, 8)).exchanges()} == {"feature"}


def test_pieces_shrink_codes_and_keep_a_third_gradient():
    one, four = step().temporaries(), step(accumulate=4).temporaries()
    assert four["codes"] == one["codes"] / 4
    assert four["gradients"] == 1.5 * one["gradients"]


def test_products_are_spread_over_both_axes_and_slots_over_rows_alone():
    D, product = 64, 2 * 512 * 64 * 4096 / 8
    for split in ((8, 1), (4, 2), (1, 8)):
        assert _roofline.operations(step("relu", split)) == 5 * product
        slots = 4 * 2 * 512 / split[0] * 8 * D
        assert _roofline.operations(step(split=split)) == product + slots


def test_a_step_takes_the_longer_of_two_and_then_sends():
    found = _roofline.seconds(step(), SLOW, "float32")
    assert found["compute"] == _roofline.operations(step()) / 50
    assert found["moving"] == _roofline.moved(step()) / 10
    longer = max(found["compute"], found["moving"])
    assert found["seconds"] == longer + found["sending"]
    halved = _roofline.seconds(step(), SLOW, "bfloat16")["compute"]
    assert halved == found["compute"] / 2


def test_neighbours_along_features_share_a_host():
    def rate(axis, split):
        return _roofline.rate(Exchange("", "", axis, 2, 1), Split(*split), SLOW)

    assert rate("feature", (8, 4)) == 5
    assert rate("feature", (4, 8)) == 1
    assert rate("data", (2, 2)) == 5
    assert rate("data", (8, 4)) == 1
    assert CHIPS["v5p"].sends_far is None


# Choice


def test_meshes_are_those_that_spread_evenly():
    found = [s.split for s in _roofline.splits(step(batch=4), 8)]
    assert found == [(1, 8), (2, 4), (4, 2)]
    in_pieces = step(batch=4, accumulate=2)
    assert [s.split for s in _roofline.splits(in_pieces, 8)] == [(1, 8), (2, 4)]


def test_the_fastest_mesh_is_the_fastest_of_those_that_fit():
    def takes(s):
        return _roofline.seconds(s, SLOW, "float32")["seconds"]

    meshes = list(_roofline.splits(step(), 8))
    best = _roofline.fastest(step(), SLOW, 8, "float32")
    assert best == min(meshes, key=takes)
    room = min(_roofline.held(s) for s in meshes) / _roofline.FILLED
    tight = SLOW._replace(memory=room)
    only = _roofline.fastest(step(), tight, 8, "float32")
    assert only == min(meshes, key=_roofline.held) != best
    none = tight._replace(memory=0.99 * room)
    assert _roofline.fastest(step(), none, 8, "float32") is None


def test_the_axis_to_grow_is_the_one_that_helps_more():
    at = step(split=(2, 2))

    def takes(split):
        wider = dataclasses.replace(at, split=Split(*split))
        return _roofline.seconds(wider, SLOW, "float32")["seconds"]

    faster = "data" if takes((4, 2)) < takes((2, 4)) else "feature"
    assert _roofline.grow(at, SLOW, "float32") == faster
    odd = dataclasses.replace(at, sae=SAE(64, 4098, "topk(k=8)"))
    assert _roofline.grow(odd, SLOW, "float32") == "data"
    assert _roofline.grow(at, SLOW._replace(memory=1.0), "float32") == "neither"


# What is written


def test_it_prints_and_writes_all_rows(tmp_path, capsys):
    given = {"chips": "v5e,v5p", "features": "131072,16777216", "widths": "768"}
    given |= {"numbers": "8,512", "out": str(tmp_path)}
    config, faults = settings.build(sizing.Config(), given)
    assert faults == []
    sizing.run(config)
    said = capsys.readouterr().out
    assert (tmp_path / "sizing.txt").read_text() == said
    with (tmp_path / "sizing.csv").open() as file:
        rows = list(csv.DictReader(file))
    # There are no slices of 512 v5e.
    assert [(r["chip"], r["chips"]) for r in rows] == [
        *[("v5e", "8")] * 4,
        *[("v5p", "8"), ("v5p", "512")] * 4,
    ]
    for r in rows:
        terms = "parameters moments counters rows exchange".split()
        at_once = max(int(r["gradients"]), int(r["codes"]))
        assert int(r["held"]) == sum(int(r[term]) for term in terms) + at_once
        assert int(r["data"]) * int(r["feature"]) == int(r["chips"])
        assert (r["fits"] == "True") == bool(r["seconds"]) == bool(r["grow"])
    assert said.count("does not fit") == sum(r["fits"] == "False" for r in rows) > 0
    assert max(map(len, said.splitlines())) <= 130


def test_a_number_of_chips_over_which_nothing_spreads():
    config = sizing.Config(chips=("v5p",), numbers=(7,), features=(2**17,), batch=64)
    rows = list(sizing.table(config))
    assert not any(r["fits"] for r in rows)
    assert "no mesh is even" in sizing.shown(config, rows)


def test_the_table_of_the_document_is_this_one():
    text = (Path(__file__).parent.parent / "experiments" / "PODS.md").read_text()
    lines = text.split("double next |\n")[1].split("\n\n")[0].splitlines()[1:]
    config, rule = sizing.Config(), ""
    for line in lines:
        name, *said = (cell.strip() for cell in line.strip("|").split("|"))
        rule = name or rule
        sae = SAE(2304, int(said[0].replace(",", "")), rule, dtype=config.dtype)
        at = Step(sae, config.batch, Recipe(), Split(1, 1))
        r = sizing.row("v5p", at, int(said[1]), config.dtype)
        state = sum(r[term] for term in ("parameters", "moments", "counters"))
        wanted = [f"{r['data']}x{r['feature']}", f"{state / 1e9:.1f}"]
        wanted += [f"{r['held'] / 1e9:.1f}"]
        if r["fits"]:
            sent = [f"{r[f'sent by {axis}'] / 1e6:.0f}" for axis in ("data", "feature")]
            wanted += [" / ".join(sent), f"{1e3 * r['seconds']:.1f}", r["grow"]]
        else:
            wanted += ["does not fit", "", ""]
        assert said[2:] == wanted
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"chips": "v5"}, "--chips: Unknown chip 'v5'"),
        ({"numbers": "0"}, "--numbers: at least one is needed"),
        ({"widths": ""}, "--widths: at least one is needed"),
        ({"batch": "10", "accumulate": "4"}, "--batch=10 is not accumulate=4 even"),
        ({"rules": "topk(k=0)"}, "--rules: topk: k=0 must be above 0"),
        (
            {"rules": "matching_pursuit(k=4)"},
            "--rules: matching_pursuit(k=4) multiplies by the encoder many times",
        ),
        ({"rules": ""}, "--rules, chips: nothing is asked for"),
    ],
)
def test_what_cannot_be_sized_is_said(given, fault):
    _, faults = settings.build(sizing.Config(), given)
    assert any(text.startswith(fault) for text in faults), faults
