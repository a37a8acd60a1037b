"""Profiles: what a trace of training holds, and sums of it on traces made by hand."""

import dataclasses
import gzip
import json
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.activations.in_memory import InMemory
from sae_jax.model import SAE
from sae_jax.run import profile
from sae_jax.run.loop import Loop
from sae_jax.run.members import Member
from sae_jax.run.profile import Profile, show
from sae_jax.trained import to_arrays
from sae_jax.training.recipe import Recipe
from tests.test_experiments import configured

ARRAYS = {"a": np.random.default_rng(0).normal(size=(96, 8)).astype(np.float32)}
MEMBERS = {
    "one": Member(SAE(8, 16, "topk(k=2)"), "a"),
    "other": Member(SAE(8, 12, "relu(coef=0.1)"), "a"),
}


def train(steps, traced=None):
    stream = InMemory(ARRAYS, batch=12, seed=5)
    recipe = Recipe(steps=steps, lr=1e-2)
    loop = Loop(MEMBERS, stream, recipe, profile=traced, progress=False)
    return {name: to_arrays(one.variables) for name, one in loop.run().items()}


def event(name, ts, dur, thread=1, program="jit_step", **more):
    args = {"hlo_op": name, "hlo_module": program} if program else {}
    return dict(ph="X", pid=7, tid=thread, ts=ts, dur=dur, name=name, args=args, **more)


def written(folder, events, steps=2, sources=None, stamp="2026_01_01"):
    place = folder / "plugins" / "profile" / stamp
    place.mkdir(parents=True)
    with gzip.open(place / "perfetto_trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    notes = {"steps": steps, "seconds": 0.5, "sources": sources or {}}
    (folder / profile.NOTES).write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Nine steps, of which three are traced."""
    folder = tmp_path_factory.mktemp("profile")
    return folder, train(9, Profile(folder, steps=3))


def test_a_traced_run_learns_the_same_bits(traced):
    untraced = train(9)
    for name, arrays in traced[1].items():
        for array, values in arrays.items():
            np.testing.assert_array_equal(values, untraced[name][array])


def test_a_trace_shows_the_operations_of_the_steps_and_what_they_are(traced):
    rows = profile.table(traced[0])
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert [row.ms for row in rows] == sorted((row.ms for row in rows), reverse=True)
    steps = [row for row in rows if row.program == "step"]
    assert any("dot_general" in row.source for row in steps)
    assert sum(row.source != "" for row in steps) > len(steps) / 2
    shown = profile.text(traced[0], top=4).splitlines()
    assert len(shown) == 2 + 4 + 1
    assert shown[0].startswith("Traced steps: 3, of ")
    assert f"{len(rows) - 4} others" in shown[-1]


@pytest.mark.parametrize(("steps", "counted"), [(9, 3), (8, 3), (7, 2)])
def test_as_many_steps_are_counted_as_were_traced(
    tmp_path, monkeypatch, steps, counted
):
    """Three are asked for after five; each runs the two members' programs once."""
    train(steps, Profile(tmp_path, steps=3))
    assert json.loads((tmp_path / profile.NOTES).read_text())["steps"] == counted
    (path,) = tmp_path.rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    known = [e["args"] for e in events if "hlo_op" in e.get("args", {})]
    runs = {e["run_id"] for e in known if e["hlo_module"] == "jit_step"}
    assert len(runs) == 2 * counted


def test_a_run_that_ends_while_it_is_warm_leaves_no_trace(tmp_path):
    train(5, Profile(tmp_path, steps=3))
    with pytest.raises(FileNotFoundError, match="more than 5 steps to go"):
        profile.table(tmp_path)
    with pytest.raises(ValueError, match="steps=0 traces nothing"):
        Profile(tmp_path, steps=0)


class Broken(InMemory):
    """The activations cannot be read any more when the trace is on."""

    def batches(self, start=0, position=None):
        for t, rows in enumerate(super().batches(start, position)):
            if t == 7:
                raise OSError("gone")
            yield rows


def test_a_run_that_fails_ends_its_trace(tmp_path):
    loop = Loop(
        MEMBERS,
        Broken(ARRAYS, batch=12),
        Recipe(steps=9),
        profile=Profile(tmp_path / "first", steps=3),
        progress=False,
    )
    with pytest.raises(OSError, match="gone"):
        loop.run()
    train(9, Profile(tmp_path / "second", steps=3))  # there is one trace at a time
    assert profile.table(tmp_path / "second")


def test_time_counts_once_where_events_lie_within_one_another(tmp_path):
    events = [
        {"ph": "M", "pid": 7, "tid": 1, "name": "thread_name"},
        event("python", 0, 1000, program=None),
        event("while", 10, 100),
        event("wait", 20, 30, program=None),  # inside the loop, for another thread
        event("dot", 60, 40),
        event("add", 70, 10),  # inside dot
        event("end: dot", 99.999, 0.1, program=None),  # a marker, ends outside
        event("dot", 110, 20),  # begins as the loop ends
        event("dot", 15, 60, thread=2),  # at the same time on another thread
        event("dot", 200, 8, program="jit_other"),
    ]
    folder = written(tmp_path, events[::-1], sources={"jit_step/dot": "jvp()/dot"})
    rows = {(row.program, row.op): row for row in profile.table(folder)}
    want = {"while": 30, "dot": 30 - 0.001 + 20 + 60, "add": 10}
    want = {("step", op): us for op, us in want.items()} | {("other", "dot"): 8}
    assert rows.keys() == want.keys()
    for name, us in want.items():
        assert rows[name].ms == pytest.approx(us / 1e3 / 2)  # of two steps
        assert rows[name].share == pytest.approx(us / sum(want.values()))
    assert rows["step", "dot"].source == "jvp()/dot"
    assert rows["other", "dot"].source == ""


def test_an_experiment_shows_the_profile_of_its_run(tmp_path, capsys):
    experiment, config = configured("train", tmp_path, profile="3")
    unprofiled = configured("train", tmp_path)[1]
    assert config.identity() == unprofiled.identity()  # both may use the folder
    experiment.run(config)
    said = capsys.readouterr().out
    assert "Traced steps: 1, of " in said  # of six, five pass before
    assert any(row.program == "step" for row in profile.table(tmp_path / "profile"))
    show(tmp_path)  # as where a run goes on that has too few steps left
    assert "holds no trace of whole steps" in capsys.readouterr().out
    faults = dataclasses.replace(config, profile=-1).faults()
    assert "profile=-1 must not be negative" in list(faults)


def test_the_newest_of_several_traces_counts(tmp_path):
    written(tmp_path, [event("old", 0, 1)], stamp="2026_01_02")
    written(tmp_path, [event("new", 0, 1)], stamp="2026_01_01")
    assert [row.op for row in profile.table(tmp_path)] == ["new"]


def test_programs_of_one_name_share_their_operations(tmp_path):
    text = (
        "HloModule jit_gather, is_scheduled=true\n"
        '  %p = f32[] parameter(0), metadata={op_name="x"}\n'
        '  ROOT %a.1 = f32[] add(%p, %p), metadata={op_name="jit(gather)/jvp()/add"}\n'
    )
    assert list(profile.sources(text)) == [("jit_gather/a.1", "jvp()/add")]

    one = Profile(tmp_path, steps=1, warm=0)
    other = text.replace("/add", "/mul")
    programs = [mock.Mock(as_text=lambda t=t: t) for t in (text, other, text)]
    one.explain(programs)
    one.between_steps(jnp.zeros(()))
    one.between_steps(jnp.zeros(()) + 1, last=True)
    notes = json.loads((tmp_path / profile.NOTES).read_text())
    assert notes["sources"] == {"jit_gather/a.1": "jvp()/add or jvp()/mul"}
