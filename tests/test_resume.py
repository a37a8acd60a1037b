"""Runs as real processes: killed, told to end, and started again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sae_jax.run.stop import INTERRUPTED, STOPPED
from tests.toys import run_harvest

STEPS = 60  # as in resume_child.py


class Child:
    """A process of `resume_child.py`."""

    def __init__(self, folder: Path, activations: str, cache: Path | None, slow="-"):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "USE_TORCH": "0"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if cache:
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        self.folder = folder
        self._errors = (folder.parent / f"{folder.name}.stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.resume_child", folder, activations, slow],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def until(self, said: str) -> bool:
        """Reads until the child says something that begins so; whether it did."""
        assert self._process.stdout is not None
        return any(line.startswith(said) for line in self._process.stdout)

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def ended(self, within: float = 120) -> tuple[int, str]:
        """Exit status and the end of what it had to say."""
        try:
            self.last_words, _ = self._process.communicate(timeout=within)
        finally:
            self._process.kill()
            self._process.wait()
        self._errors.seek(0)
        with self._errors:
            return self._process.returncode, self._errors.read()[-2000:]


def left(folder: Path) -> dict[str, bytes]:
    """What must be the same bytes."""
    names = ("metrics.jsonl", "config.json", "saes/*/sae.safetensors")
    found = [path for name in names for path in sorted(folder.glob(name))]
    assert len(found) == 4
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def checkpoints(folder: Path) -> list[int]:
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in names), names
    return sorted(map(int, names))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Any]:
    """A cache of compiled programs, and for each kind of activations a whole run."""
    base = tmp_path_factory.mktemp("runs")
    run_harvest(base / "shards")
    cache, whole = base / "cache", {}
    for kind, activations in {"text": "text", "shards": str(base / "shards")}.items():
        child = Child(base / f"run-{kind}", activations, cache)
        assert child.ended() == (0, "")
        whole[kind] = activations, left(base / f"run-{kind}")
    return {"cache": cache, **whole}


def finishes(folder: Path, runs: dict[str, Any], kind: str) -> None:
    """The same command goes on, and leaves what a run does that is never stopped."""
    activations, whole = runs[kind]
    status, said = Child(folder, activations, runs["cache"]).ended()
    assert status == 0, said
    assert left(folder) == whole


@pytest.mark.parametrize("kind", ["text", "shards"])
def test_killed_at_any_moment_it_goes_on_to_the_bit(runs, tmp_path, kind):
    """SIGKILL: early, at a batch, while a checkpoint is begun and written, late."""
    rng, folder = random.Random(kind), tmp_path / "run"
    moments = ["started", "batch 1", "save 2", "batch 4"]
    for moment in moments:
        child = Child(folder, runs[kind][0], runs["cache"])
        assert child.until(moment), child.ended()
        if moment == "save 2":
            unfinished = folder / "checkpoints"
            deadline = time.monotonic() + 30
            while not list(unfinished.glob("*tmp*")):
                assert time.monotonic() < deadline
        else:
            time.sleep(rng.uniform(0, 0.2))
        child.send(signal.SIGKILL)
        assert child.ended()[0] == -signal.SIGKILL
    assert not (folder / "saes").exists()
    finishes(folder, runs, kind)


def told(runs, folder, slow, moment, number=signal.SIGTERM) -> tuple[str, str]:
    """Tells a child to end when it is at some moment; what it says of that, and did."""
    child = Child(folder, runs["shards"][0], runs["cache"], slow)
    assert child.until(moment), child.ended()
    time.sleep(0.1)
    child.send(number)
    began = time.monotonic()
    status, said = child.ended(within=20)
    assert status == STOPPED, said
    assert time.monotonic() - began < 5
    assert f"\n{number.name}: " in said
    return said, child.last_words


def test_told_in_the_middle_of_training_it_saves_that_step(runs, tmp_path):
    said, last_words = told(runs, tmp_path / "run", "-", "batch 21")
    step = max(checkpoints(tmp_path / "run"))
    assert f"{step} steps are safe in {tmp_path / 'run' / 'checkpoints'}." in said
    drawn = [line for line in last_words.splitlines() if line.startswith("batch ")]
    assert drawn[-1] in (f"batch {step}", f"batch {step - 1}")
    finishes(tmp_path / "run", runs, "shards")


def test_told_during_an_evaluation_it_need_not_end_first(runs, tmp_path):
    said, _ = told(runs, tmp_path / "run", "evaluation", "evaluating", signal.SIGINT)
    assert "20 steps are safe" in said
    assert max(checkpoints(tmp_path / "run")) == 20
    finishes(tmp_path / "run", runs, "shards")


@pytest.mark.parametrize(
    ("slow", "moment"), [("start", "started"), ("first batch", "warming up")]
)
def test_told_before_anything_was_trained(runs, tmp_path, slow, moment):
    said, _ = told(runs, tmp_path / "run", slow, moment)
    assert "There was nothing to save" in said


def test_told_while_the_compiler_works_it_does_not_wait(runs, tmp_path):
    """The main thread is in the compiler, where no Python runs, for many seconds."""
    child = Child(tmp_path / "run", runs["shards"][0], None, "compilation")
    assert child.until("compiling"), child.ended()
    time.sleep(0.5)
    child.send(signal.SIGTERM)
    began = time.monotonic()
    status, said = child.ended()
    assert status == STOPPED, said
    assert time.monotonic() - began < 2.5
    assert "0 steps are safe" in said


@pytest.mark.parametrize("slow", ["save", "save, compilation"])
def test_a_second_interrupt_leaves_at_once(runs, tmp_path, slow):
    cache = None if "compilation" in slow else runs["cache"]
    child = Child(tmp_path / "run", runs["shards"][0], cache, slow)
    assert child.until("compiling" if "compilation" in slow else "batch 3")
    time.sleep(0.2)
    child.send(signal.SIGINT)
    time.sleep(0.5)
    child.send(signal.SIGINT)
    began = time.monotonic()
    assert child.ended()[0] == INTERRUPTED
    assert time.monotonic() - began < 2.5
