"""The loop: wherever it is stopped, going on gives the same bits."""

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.activations.in_memory import Given, InMemory
from sae_jax.losses import AuxK
from sae_jax.model import SAE
from sae_jax.run.checkpoints import Checkpoints, Restored
from sae_jax.run.diverged import NotFinite
from sae_jax.run.groups import Groups, grouped
from sae_jax.run.log import JsonLines
from sae_jax.run.loop import Every, Loop
from sae_jax.run.members import Member
from sae_jax.run.stop import Stop
from sae_jax.trained import to_arrays
from sae_jax.training import ensemble as ensemble_module
from sae_jax.training.knob import Knob
from sae_jax.training.recipe import Recipe
from sae_jax.training.step import init_state

RNG = np.random.default_rng(0)
A = RNG.normal(size=(96, 8)).astype(np.float32)
ARRAYS = {"a": A, "b": (A @ RNG.normal(size=(8, 6))).astype(np.float32)}
STEPS, BATCH = 11, 12
RECIPE = Recipe(steps=STEPS, lr=1e-2, warmup=2, decay="cosine")
EVERY = Every(log=3, evaluate=4, save=2)
MEMBERS = {
    "threshold": Member(SAE(8, 16, "batch_topk(k=2)", treatment="scale"), "a", seed=1),
    "adapted": Member(SAE(8, 12, "group_bias(groups=3, every=3)"), "a", seed=2),
    "drawn": Member(SAE(8, 12, "variational(k=2, warmup=4)"), "a", seed=3),
    "across": Member(SAE(8, 16, "topk(k=2)", d_out=6), "a", target="b", seed=4),
}


class Stopped(Exception):
    """What stops a run in these tests."""


class Hooks:
    """Counts what a run does, and stops it at the event that is asked for."""

    def __init__(self, stop_at=None, *, told=False):
        self.stop_at, self.told, self.stop = stop_at, told, Stop()
        self.seen: Counter[str] = Counter()
        self.said: list[str] = []
        self.stopped = False

    def __call__(self, event):
        self.seen[event] += 1
        if (event, self.seen[event]) != self.stop_at:
            return
        if self.told:  # as the thread does that a signal wakes
            thread = threading.Thread(target=self._told)
            thread.start()
            thread.join()
        self.stopped = True
        raise Stopped

    def _told(self):
        if self.stop.lock.acquire(blocking=False):  # else it would come later
            try:
                self.said.append(self.stop.save())
            finally:
                self.stop.lock.release()


class Memory(Checkpoints):
    """Checkpoints without a disk, for the many runs here; what Orbax does is slow."""

    def __init__(self):
        self.folder = Path("memory")
        self.held: dict[int, tuple[Any, str]] = {}

    def save(self, step, state, notes):
        if step not in self.held:
            self.held[step] = jax.tree.map(jnp.copy, state), json.dumps(notes)

    def restore(self, like, report=print):
        if not self.held:
            return None
        step, (state, notes) = max(self.held.items())
        return Restored(step, jax.tree.map(jnp.copy, state), json.loads(notes))

    def wait(self):
        pass

    close = wait


def on_disk(folder):
    return Checkpoints(folder / "checkpoints", keep=2)


def run(folder, hooks, store, members=MEMBERS, recipe=RECIPE, every=EVERY):
    """One process's part of a run: everything is made anew."""
    metrics, kept = folder / "metrics.jsonl", 0

    class Stream(InMemory):
        def batches(self, start=0, position=None):
            for batch in super().batches(start, position):
                hooks("batch")
                yield batch

        def position(self, t):
            hooks("position")  # asked for when all have taken their step
            return super().position(t)

    class Lines(JsonLines):
        safe = 0

        def write(self, line):
            hooks("line")
            super().write(line)

        def flush(self):
            hooks("flush")
            super().flush()
            self.safe = metrics.stat().st_size
            hooks("flushed")

        def close(self):
            super().close()
            if hooks.stopped:  # a killed process writes nothing more
                os.truncate(metrics, max(self.safe, kept))

    def opened(start):
        nonlocal kept
        log = Lines(metrics, start)
        kept = metrics.stat().st_size
        return [log]

    class Kept(Checkpoints):
        def __init__(self):
            self.restore, self.wait = store.restore, store.wait
            self.folder = store.folder

        def save(self, step, state, notes):
            hooks("save")
            store.save(step, state, notes)
            hooks("saved")

    def evaluate(name, sae, variables):
        hooks("evaluate")
        return {"size": float(jnp.abs(variables.params["W_dec"]).sum()), "none": None}

    try:
        return Loop(
            members,
            Stream(ARRAYS, batch=BATCH, seed=5),
            recipe,
            every=every,
            logs=opened,
            checkpoints=Kept(),
            evaluate=evaluate,
            stop=hooks.stop,
            progress=False,
        ).run()
    finally:
        store.close()


def left(folder, store, trained) -> dict[str, Any]:
    """Everything that must be the same."""
    found: dict[str, Any] = {"metrics": (folder / "metrics.jsonl").read_bytes()}
    for name, one in trained.items():
        for array, values in to_arrays(one.variables).items():
            found[f"{name}.{array}"] = values.tobytes()
    last = store.restore({"held": LIKE[0]})
    store.close()
    assert last is not None
    assert last.step == STEPS
    for path, array in jax.tree_util.tree_leaves_with_path(last.state):
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        found[jax.tree_util.keystr(path)] = np.asarray(array).tobytes()
    return found


LIKE: list[Any] = []


@pytest.fixture(scope="module")
def programs():
    """What takes most of the time, and is the same in all the runs here."""
    stream = InMemory(ARRAYS, batch=BATCH, seed=5)
    rows = next(stream.batches())
    groups = grouped(MEMBERS, RECIPE)
    starts = groups.fresh(rows)
    shapes = groups.shapes(stream)
    LIKE[:] = [groups.named(shapes)]
    steps = groups.compile(starts, rows)
    return {
        "compile": lambda *_: steps,
        "shapes": lambda *_: shapes,
        "fresh": lambda *_: jax.tree.map(jnp.copy, starts),
    }


@pytest.fixture
def quick(programs, monkeypatch):
    """Runs of `MEMBERS` without tracing and compiling."""
    for name, made in programs.items():
        monkeypatch.setattr(Groups, name, made)


@pytest.fixture(scope="module")
def whole(programs, tmp_path_factory):
    """What a run leaves that is never stopped, and what it did."""
    folder, hooks, store = tmp_path_factory.mktemp("whole"), Hooks(), Memory()
    with pytest.MonkeyPatch.context() as patch:
        for name, made in programs.items():
            patch.setattr(Groups, name, made)
        return left(folder, store, run(folder, hooks, store)), hooks.seen


def test_the_log_of_a_run(whole):
    lines = [json.loads(line) for line in whole[0]["metrics"].splitlines()]
    due = {3: "train", 4: "eval", 6: "train", 8: "eval", 9: "train"}
    expected = [(t, kind, name) for t, kind in due.items() for name in MEMBERS]
    expected += [(STEPS, kind, name) for kind in ("train", "eval") for name in MEMBERS]
    assert [(line["step"], line["kind"], line["sae"]) for line in lines] == expected
    assert all(line["rows"] == BATCH * line["step"] for line in lines)


# A stop at every batch and around every checkpoint, at some lines and evaluations.
STOPS = [
    *(("batch", n) for n in range(1, STEPS + 1)),
    ("position", 6),
    *(("line", n) for n in (1, 5, 8, 10, 16, 25, 28)),
    *(("evaluate", n) for n in (1, 3, 5, 6, 12)),
    *((event, n) for event in ("flush", "flushed", "save", "saved") for n in (1, 2, 5)),
]


@pytest.mark.parametrize("told", [False, True], ids=["killed", "told"])
def test_a_run_goes_on_to_the_bit_wherever_it_was_stopped(quick, whole, tmp_path, told):
    expected, seen = whole
    for event, n in STOPS:
        assert n <= seen[event]
        folder, store = tmp_path / f"{event}{n}", Memory()
        folder.mkdir()
        with pytest.raises(Stopped):
            run(folder, Hooks((event, n), told=told), store)
        assert left(folder, store, run(folder, Hooks(), store)) == expected, (event, n)


def test_a_run_may_be_stopped_again_and_again(quick, whole, tmp_path):
    for event, n in [("batch", 2), ("save", 2), ("batch", 3), ("line", 2)]:
        for told in (False, True):
            with pytest.raises(Stopped):
                run(tmp_path, Hooks((event, n), told=told), on_disk(tmp_path))
    trained = run(tmp_path, Hooks(), on_disk(tmp_path))
    assert left(tmp_path, on_disk(tmp_path), trained) == whole[0]
    hooks = Hooks()  # and all of it is done
    trained = run(tmp_path, hooks, on_disk(tmp_path))
    assert left(tmp_path, on_disk(tmp_path), trained) == whole[0]
    assert hooks.seen["batch"] == 0


def test_told_in_the_middle_it_loses_no_step(quick, tmp_path):
    store, hooks = Memory(), Hooks(("batch", 8), told=True)
    with pytest.raises(Stopped):
        run(tmp_path, hooks, store)
    assert hooks.said == ["7 steps are safe in memory. The same command goes on."]
    hooks = Hooks()
    run(tmp_path, hooks, store)
    assert hooks.seen["batch"] == STEPS - 7


def plain_steps(members, recipe):
    """The same training without the loop: each SAE alone, step by step."""
    for name, member in members.items():
        step, state, seen = recipe.make_step(member.sae, jit=False), None, []
        step = jax.jit(step)
        batches = InMemory(ARRAYS, batch=BATCH, seed=5).batches()
        for _, rows in zip(range(recipe.steps), batches, strict=False):
            batch = {"x": rows[member.site]}
            if member.target:
                batch["target"] = rows[member.target]
            if state is None:
                state = init_state(
                    member.sae,
                    recipe.optimiser(),
                    jax.random.key(member.seed),
                    sample=batch["x"],
                    target_sample=batch.get("target"),
                )
            state, metrics = step(state, batch)
            seen.append({k: float(v) for k, v in metrics.items()})
        yield name, state, seen


def check_against_plain_steps(trained, metrics, members, recipe):
    lines = [json.loads(line) for line in metrics.splitlines()]
    for name, state, seen in plain_steps(members, recipe):
        for array, values in to_arrays(state.variables).items():
            # Another program of the same step: equal but for the order of sums.
            ours = to_arrays(trained[name].variables)[array]
            np.testing.assert_allclose(ours, values, rtol=2e-4, atol=2e-6)
        before = 0
        for line in lines:
            if (line["sae"], line["kind"]) != (name, "train"):
                continue
            window = seen[before : line["step"]]
            before = line["step"]
            averaged = window[0].keys() - {"step", "finite", "diverged"}
            assert line.keys() >= averaged
            for metric in averaged:
                values = [one[metric] for one in window]
                want = values[-1] if metric in ("dead", "knob") else np.mean(values)
                assert line[metric] == pytest.approx(want, rel=2e-4), metric
        assert before == recipe.steps


def test_the_loop_is_the_plain_steps_and_windows_are_their_means(
    quick, whole, tmp_path
):
    trained = run(tmp_path, Hooks(), Memory())
    check_against_plain_steps(trained, whole[0]["metrics"], MEMBERS, RECIPE)


def test_schedules_and_dead_features_are_those_of_the_last_step(tmp_path):
    sae = SAE(8, 64, "topk(k=2)")
    recipe = Recipe(steps=7, knob=Knob(start=3.0, steps=6), aux=AuxK(dead_after=2))
    members = {"one": Member(sae, "a")}
    trained = run(tmp_path, Hooks(), Memory(), members, recipe)
    text = (tmp_path / "metrics.jsonl").read_bytes()
    check_against_plain_steps(trained, text, members, recipe)
    lines = [json.loads(line) for line in text.splitlines()]
    dead = [line["dead"] for line in lines if line["kind"] == "train"]
    assert all(n == int(n) for n in dead)
    assert dead[-1] > 0
    # Step 2, step 5, step 6 of a ramp from 6 to 2 within 6 steps.
    knobs = [line["knob"] for line in lines if line["kind"] == "train"]
    assert knobs == pytest.approx([6 - 4 * 2 / 6, 6 - 4 * 5 / 6, 2])


class Poisoned(InMemory):
    """Batch 6, of step 6, has an infinity in it."""

    def batches(self, start=0, position=None):
        for t, rows in enumerate(super().batches(start, position), start=start):
            yield {**rows, "a": rows["a"].at[0, 0].set(jnp.inf)} if t == 6 else rows


@pytest.mark.parametrize(
    ("every", "window", "good", "lines"),
    [
        (Every(log=4, save=5), "4 to 7", "checkpoints/5", [4]),
        (Every(log=3, save=2), "6 to 7", "checkpoints/6", [3, 6]),
        (Every(log=2, save=100), "6 to 7", None, [2, 4, 6]),
        (Every(log=100, save=7), "0 to 6", None, []),
    ],
)
def test_the_first_bad_step_is_named_and_never_saved(
    tmp_path, every, window, good, lines
):
    members = {name: MEMBERS[name] for name in ("threshold", "adapted")}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    stop = Stop()
    loop = Loop(
        members,
        Poisoned(ARRAYS, batch=BATCH),
        RECIPE,
        every=every,
        logs=lambda start: [JsonLines(tmp_path / "metrics.jsonl", start)],
        checkpoints=checkpoints,
        stop=stop,
        progress=False,
    )
    with pytest.raises(NotFinite) as error:
        loop.run()
    said = str(error.value)
    assert said.startswith("threshold: the loss or its gradient was not finite in ")
    assert "finite in step 6, in the window of" in said
    assert f"window of steps {window}." in said
    assert (f"{good}. " if good else "There is no checkpoint. ") in said
    stop.save()
    checkpoints.wait()
    assert all(step <= 6 for step in checkpoints.steps())
    checkpoints.close()
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    seen = [(line["step"], line["sae"]) for line in map(json.loads, text)]
    assert seen == [(t, name) for t in lines for name in members]


def test_between_log_points_nothing_waits_for_the_device(quick, monkeypatch):
    """Nothing is fetched but when a window is read, after the next has begun.

    JAX's own guard lets everything pass on CPU, where host and device share memory;
    so all ways to a value of an array are counted instead.
    """
    drawn, fetched = [], []
    kind = type(jnp.zeros(()))
    real = kind._value

    def value(self):
        fetched.append(len(drawn))
        return real.fget(self)

    class Stream(InMemory):
        def batches(self, start=0, position=None):
            for rows in super().batches(start, position):
                drawn.append(1)
                yield rows

    monkeypatch.setattr(kind, "_value", property(value))
    ready = kind.block_until_ready
    monkeypatch.setattr(
        kind, "block_until_ready", lambda self: fetched.append(-1) or ready(self)
    )
    arrays = {site: jnp.asarray(array) for site, array in ARRAYS.items()}
    stream = Stream(arrays, batch=BATCH)
    fetched.clear()
    every = Every(log=3, save=100)
    Loop(MEMBERS, stream, RECIPE, every=every, progress=False).run()
    # After 6 and 9 steps the windows that ended with 3 and 6, when the batch after
    # them was drawn; at the end those of 9 and 11.
    assert set(fetched) == {7, 10, 11}


def test_alike_members_share_a_program(monkeypatch):
    compiled, traced, gathered = [], [], ensemble_module.gathered
    real = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: compiled.append(1) or real(self)
    )
    monkeypatch.setattr(
        ensemble_module, "gathered", lambda step: traced.append(1) or gathered(step)
    )
    sae, other = SAE(8, 16, "topk(k=3)"), SAE(8, 16, "topk(k=1)")
    members = {f"seed{i}": Member(sae, "a", seed=i) for i in range(3)}
    members["other"] = Member(other, "a")
    stream = InMemory(ARRAYS, batch=BATCH)
    trained = Loop(members, stream, RECIPE, progress=False).run()
    assert len(compiled) == len(traced) == 2
    arrays = [np.asarray(one.variables.params["W_enc"]) for one in trained.values()]
    assert len({array.tobytes() for array in arrays}) == 4


def test_what_does_not_fit_is_said_at_once():
    stream = InMemory(ARRAYS, batch=BATCH)
    members = {
        "wide": Member(SAE(9, 16, "topk(k=2)"), "a"),
        "nowhere": Member(SAE(8, 16, "topk(k=2)"), "c"),
        "aimless": Member(SAE(8, 16, "topk(k=2)", d_out=6), "a"),
    }
    with pytest.raises(ValueError, match="wide: a is 8 wide, the SAE is made for 9"):
        Loop(members, stream, RECIPE)
    with pytest.raises(ValueError, match=r"nowhere: no site 'c'; there are a, b"):
        Loop(members, stream, RECIPE)
    with pytest.raises(ValueError, match="aimless: a transcoder, and only a"):
        Loop(members, stream, RECIPE)


def test_training_ends_with_the_activations(tmp_path):
    members = {"one": Member(SAE(8, 16, "topk(k=2)"), "x")}
    batches = (A[i : i + 12] for i in range(0, 60, 12))
    loop = Loop(members, Given(batches, "x"), RECIPE, progress=False)
    trained = loop.run()["one"]
    assert trained.about["steps"] == 5
    assert [line["step"] for line in trained.history] == [5]
