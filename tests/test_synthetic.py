"""The planted-truth benchmark: all rules, their sparsity, its files, going on."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import _matched, _worlds, synthetic
from sae_jax import RULES, SAE, rules, settings
from sae_jax.binding import bind
from sae_jax.training.recipe import Recipe

TINY = {
    "worlds": "equal,hierarchical",
    "seeds": "3",
    "n_features": "12",
    "batch": "16",
    "held_out": "64",
    "tries": "0",
    "config.planted.width": "8",
    "config.planted.features": "10",
    "config.planted.l0": "2",
    "config.train.steps": "4",
    "config.train.warmup": "0",
}
# A budget; a knob to steer; gradients; a tied dictionary; random numbers; as given.
FEW = "topk,relu,gradient_topk,toy_tied,variational,top_afa"
ROW = (
    "world rule given seed matched spec how l0 true_l0 nmse matched_cosine mmcs frr80 "
    "frr90 precision recall f1 l0_correlation dead diverged_in_step"
).split()
ROOT = Path(__file__).parent.parent


def configured(out, **given: str) -> synthetic.Config:
    config, faults = settings.build(
        synthetic.Config(), {**TINY, "out": str(out), **given}
    )
    assert faults == []
    return config


def test_it_trains_every_kind_of_rule_and_leaves_all_that_it_promises(tmp_path, capsys):
    rows = synthetic.run(configured(tmp_path, rules=FEW))
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "synthetic.json").read_text()) == rows
    assert [(row["world"], row["rule"]) for row in rows] == [
        (world, rule) for world in ("equal", "hierarchical") for rule in FEW.split(",")
    ]
    for row in rows:
        assert list(row) == ROW
        assert row["seed"] == 3
        off = abs(row["l0"] - row["true_l0"]) / row["true_l0"]
        assert row["matched"] == (off <= 0.1)
        assert rules.parse(row["spec"]).rule.name == row["rule"]
        for score in ("nmse", "matched_cosine", "mmcs", "f1", "dead"):
            assert np.isfinite(row[score])
        assert row["diverged_in_step"] is None
    hows = {row["rule"]: row["how"] for row in rows}
    assert hows["topk"] == hows["gradient_topk"] == "budget"
    assert hows["relu"] == hows["toy_tied"] == "steered"
    assert hows["top_afa"] == "as given"
    text = (tmp_path / "synthetic.txt").read_text()
    assert text in said
    assert "World hierarchical" in text
    assert (tmp_path / "synthetic.md").read_text().startswith("| rule | equal (")
    assert (tmp_path / "synthetic.png").stat().st_size > 5000


def test_it_goes_on_where_it_was_killed_and_takes_more_seeds(tmp_path, monkeypatch):
    config = configured(tmp_path, rules="topk,gradient_topk")
    one, trained = synthetic.row_of, []

    def killed(config, cell):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(cell)
        return one(config, cell)

    monkeypatch.setattr(synthetic, "row_of", killed)
    with pytest.raises(KeyboardInterrupt):
        synthetic.run(config)
    kept = json.loads((tmp_path / "synthetic.json").read_text())
    assert len(kept) == 3
    trained.clear()
    rows = synthetic.run(config)
    assert rows[:3] == kept
    assert trained == config.cells()[3:]
    assert config.conflicts() == []
    trained.clear()
    more = dataclasses.replace(config, seeds=(4, 3), worlds=("equal",))
    assert more.conflicts() == []
    rows = synthetic.run(more)
    assert [(cell.world, cell.seed) for cell in trained] == [("equal", 4)] * 2
    assert len(rows) == 6
    # The same again is the same, and another seed is something else.
    assert one(config, config.cells()[0]) == rows[0]
    assert rows[4]["nmse"] != rows[0]["nmse"]
    [fault] = dataclasses.replace(config, held_out=65).conflicts()
    assert "holds a run with other settings: held_out was 64 and is 65" in fault


def test_the_rules_are_those_of_the_registry():
    config = synthetic.Config()
    names = [rules.parse(spec).rule.name for spec in config.specs()]
    assert names == list(RULES)
    assert len(config.cells()) == len(RULES) * 5 * 3
    given = dataclasses.replace(config, rules=("topk(k=5)",))
    assert given.specs() == ("topk(k=5)",)


FILES = "synthetic _matched _worlds _recovery _recovery_table _recovery_figure".split()


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_it_names_a_rule(name):
    """In code; the example of its docstring may."""
    code = (ROOT / "experiments" / f"{name}.py").read_text()
    code = re.sub(r'"""[\s\S]*?"""|#.*', "", code)
    assert not [rule for rule in RULES if re.search(rf"\b{rule}\b", code)]


@pytest.mark.parametrize("name", [*RULES])
def test_every_rule_has_a_way_to_its_sparsity(name):
    [spec] = [s for s in _matched.all_rules() if rules.parse(s).rule.name == name]
    found = _matched.plan(spec, 16, 64, 3.4, Recipe(steps=10))
    rule, hp = RULES[name], found.sae.bound.hp
    if rule.budget:
        assert found.how == "budget"
        assert hp[rule.budget] == (3 if isinstance(hp[rule.budget], int) else 3.4)
    elif rule.knob_raises_l0 is None or rule.knob not in rule.traced:
        assert found.how == "as given"
    else:
        assert found.how == "steered"
        assert found.recipe.knob.target_l0 == 3.4
    assert found.sae == SAE(16, 64, found.sae.bound)


def test_an_argument_without_default_is_taken_from_the_example(monkeypatch):
    def encode(inputs, params, state, *, k: int):
        raise NotImplementedError

    rule = dataclasses.replace(
        RULES["topk"], encode=encode, example={"k": 4}, faults=lambda n_features: ()
    )
    monkeypatch.setitem(RULES._items, "topk", rule)
    assert "topk(k=4)" in _matched.all_rules()


def test_whole_budgets_are_rounded_and_never_nothing():
    topk, batch = (bind(RULES[n], {}) for n in ("topk", "batch_topk"))
    assert _matched.with_budget(topk, 3.6).hp["k"] == 4
    assert _matched.with_budget(topk, 0.2).hp["k"] == 1
    assert _matched.with_budget(batch, 3.6).hp["k"] == 3.6
    assert _matched.with_budget(rules.parse("batch_topk(k=2)"), 3.6).hp["k"] == 3.6


def test_a_rule_that_reads_gradients_sees_them_on_held_out_rows_too(tmp_path):
    config = configured(tmp_path, rules="gradient_topk,topk")
    keys = _matched.keys(3)
    world = _worlds.make("equal", config.planted, keys.world)
    rows = _matched.held_out(world, keys, config.held_out)
    for spec, reads in (("gradient_topk", True), ("topk", False)):
        plan = config.plan(spec)
        trained = _matched.train(plan, world, keys, config.batch)
        scores = _matched.scored(plan, trained, world, rows)
        given = rows._replace(grad=rows.grad[::-1])
        again = _matched.scored(plan, trained, world, given)
        assert (again != scores) == reads


@pytest.mark.parametrize("power", [-2.0, -0.5, 1.5])
def test_the_search_finds_the_knob_of_a_power_law(power):
    """From 3 to 7 features: the secant of a straight line is exact."""

    def l0(knob):
        return 3 * (knob / 0.01) ** power

    points = [(0.01, 3.0)]
    for _ in range(12):
        knob = _matched.next_knob(points, 7.0, rises=power > 0)
        assert 1 / 4.001 < knob / points[-1][0] < 4.001
        points.append((knob, l0(knob)))
    np.testing.assert_allclose(points[-1][1], 7, rtol=1e-6)


def test_the_search_does_not_follow_a_slope_of_the_wrong_sign():
    # L0 should fall with the knob and rose: too many features still mean more of it.
    knob = _matched.next_knob([(0.01, 5.0), (0.02, 6.0)], 3.0, rises=False)
    np.testing.assert_allclose(knob, 0.04)
    # Nothing active: as far down as it goes in one move.
    np.testing.assert_allclose(_matched.next_knob([(0.4, 0.0)], 3.0, rises=False), 0.1)


def test_the_training_nearest_to_the_truth_is_kept(monkeypatch):
    """Steering ends at 4; constant knobs give 3.6, 2.9 and would give more."""
    found, knobs = iter([4.0, 3.6, 2.9, 3.0]), []

    def train(plan, world, keys, batch, knob=None):
        knobs.append(knob)
        return _matched.Trained(None, 0.01 if knob is None else knob)

    def scored(plan, trained, world, rows):
        return {"l0": next(found), "true_l0": 3.0, "how": plan.how}

    monkeypatch.setattr(_matched, "train", train)
    monkeypatch.setattr(_matched, "scored", scored)
    plan = _matched.plan("relu", 8, 16, 3.0, Recipe(steps=10))
    best = _matched.best(plan, None, None, 4, None, near=0.1, tries=3)
    assert best == {"l0": 2.9, "true_l0": 3.0, "how": "searched"}
    assert knobs[:2] == [None, 0.01]
    assert len(knobs) == 3
    assert knobs[2] > 0.01
    # Without tries what steering gave stands, as does what is farther off than it.
    found = iter([4.0, 9.0])
    best = _matched.best(plan, None, None, 4, None, near=0.1, tries=0)
    assert best["how"] == "steered"
    best = _matched.best(plan, None, None, 4, None, near=0.1, tries=0)
    assert best["l0"] == 9.0


def test_a_knob_that_is_given_stays_where_it_is(tmp_path):
    config = configured(tmp_path, rules="relu")
    plan, keys = config.plan("relu"), _matched.keys(3)
    world = _worlds.make("equal", config.planted, keys.world)
    rows = _matched.held_out(world, keys, config.held_out)
    steered = _matched.train(plan, world, keys, config.batch)
    assert steered.knob > 0.00101
    assert steered.state.control > 1.01
    fixed = _matched.train(plan, world, keys, config.batch, 0.02)
    assert (fixed.knob, fixed.state.control) == (0.02, 1)
    assert "coef=0.02" in _matched.scored(plan, fixed, world, rows)["spec"]
    params = (trained.state.variables.params for trained in (steered, fixed))
    first, second = (np.asarray(p["W_dec"]) for p in params)
    assert not np.allclose(first, second, atol=1e-6), "the coefficient counts"


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        (
            {"batch": "0", "seeds": "", "tolerance": "-1"},
            [
                "--batch=0 must be at least 1",
                "--seeds: nothing would be trained",
                "--tolerance=-1.0 must not be negative",
            ],
        ),
        ({"worlds": "equal,equal"}, ["--worlds: give each once"]),
        ({"worlds": "flat"}, ["one of equal, zipf, correlated"]),
        (
            {"config.planted.width": "0", "config.planted.noise": "-1"},
            [
                "--config.planted.width=0 must be at least 1",
                "--config.planted.noise=-1.0 must not be negative",
            ],
        ),
        (
            {"worlds": "zipf", "config.planted.exponent": "4"},
            ["--config.planted.l0=2.0 asks of the most frequent feature of the world"],
        ),
        (
            {"n_features": "1", "rules": "topk(k=3)"},
            ["--rules: topk: k=2 must be above 0 and at most n_features=1"],
        ),
        (
            {"config.train.knob.target_l0": "4"},
            ["--config.train.knob.target_l0 is the"],
        ),
        ({"config.train.accumulate": "3"}, ["accumulate=3"]),
    ],
)
def test_what_cannot_be_run_is_said_all_together(given, faults):
    _, found = settings.build(synthetic.Config(), {**TINY, "rules": "topk", **given})
    for fault in faults:
        assert [said for said in found if fault in said], found


def test_a_dry_run_says_how_much_there_is_to_do():
    config = dataclasses.replace(synthetic.Config(), rules=("topk", "relu", "top_afa"))
    said = config.estimates()
    assert said["SAEs"] == ("45 (3 rules, 5 worlds, 3 seeds), 64 features of width 32")
    assert said["sparsity of the rules"] == "1 budget, 1 steered, 1 as given"
    assert said["rows"] == (
        "768,000 for each (3,000 steps of 256), 135,000 steps in all"
    )


@pytest.mark.slow
def test_at_matched_sparsity_the_truth_is_found():
    config = synthetic.Config()
    for rule in ("topk", "relu"):
        row = synthetic.row_of(config, synthetic.Cell("equal", rule, 0))
        print(synthetic.said(row))
        assert row["matched"]
        assert row["matched_cosine"] > 0.8
        assert row["f1"] > 0.6
