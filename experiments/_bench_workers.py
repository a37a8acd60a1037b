"""Workers of `bench`: one system each, in a process of its own, asked for single steps.

Both ends of the pipe are here, in lines of JSON. A worker may run in an environment
that has nothing of ours, so this file needs the standard library alone.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
WARM_UP = 2  # steps before the first that is timed


@dataclass(frozen=True)
class Task:
    """What every system of one configuration is asked to do.

    Attributes:
      rule, spec, values: our rule by name, as text, and its hyperparameters by name.
      batch, n_features: rows B of a batch, size F of the dictionary.
      folder: where `_bench_data.write` left rows and weights.
      threads: cores that a worker may use.
      dtype: type of the operands of matrix products.
      compile_peers: whether a peer that can be compiled is.
      rule_files: Python files with rules of the user's own.
      accumulate: pieces of a batch that ours takes one after another.
    """

    rule: str
    spec: str
    values: Mapping[str, Any]
    batch: int
    n_features: int
    folder: str
    threads: int
    dtype: str
    compile_peers: bool
    rule_files: tuple[str, ...] = ()
    accumulate: int = 1


class System(NamedTuple):
    """What a worker has built.

    Attributes:
      step: takes one training step on the next batch and waits until it is done; gives
        something that `float` turns into the mean-MSE before the step.
      versions: of the libraries, by name.
      device: what it computes on.
    """

    step: Callable[[], Any]
    versions: dict[str, str]
    device: str


def peak_resident() -> int:
    """The most bytes that this process ever had in memory, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(s.split()[1]) for s in lines if s.startswith("VmHWM"))


def serve(
    task: Task,
    start: Callable[[], Callable[[], int]],
    build: Callable[[Task], System],
) -> None:
    """A worker's work: starts the library, builds the system, then steps when asked.

    `start` gives what counts bytes of memory at the highest point so far: those of the
    process, or of a GPU if the library works on one.

    JAX takes as many threads as it finds cores, so all systems are given theirs alike.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    peak = start()
    bare = peak()
    system = build(task)
    began = time.perf_counter()
    mse = float(system.step())
    first = time.perf_counter() - began
    for _ in range(1, WARM_UP):
        system.step()
    forget_peak()
    answer(
        versions=system.versions,
        device=system.device,
        mse=mse,
        first=first,
        bare_mb=bare / 1e6,
    )
    for _ in sys.stdin:
        began = time.perf_counter()
        system.step()
        seconds = time.perf_counter() - began
        answer(seconds=seconds, peak_mb=peak() / 1e6)


def forget_peak() -> None:
    """Gives back what building and compiling left over; counts the peak from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def answer(**values: Any) -> None:
    """One line of JSON."""
    print(json.dumps(values), flush=True)


class Worker:
    """The benchmark's end: a process that steps when it is told to.

    Attributes:
      hello: what it said when it was ready.
      seconds: of each step that was asked for.
      peak_mb: its memory at the highest point so far.
    """

    def __init__(
        self, python: str, command: list[str], task: Task, env: Mapping[str, str]
    ) -> None:
        self._name = " ".join(command)
        self._process = subprocess.Popen(
            [python, "-m", *command, json.dumps(asdict(task))],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self._read()
        self.seconds: list[float] = []
        self.peak_mb = 0.0

    def step(self) -> float:
        """Asks for one step; its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        said = self._read()
        self.seconds.append(said["seconds"])
        self.peak_mb = said["peak_mb"]
        return said["seconds"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._process.communicate()  # ends its input, and waits for it to end

    def _read(self) -> dict[str, Any]:
        """The next line of JSON; libraries may print other lines."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._process.communicate()
        raise ChildProcessError(
            f"the worker `{self._name}` ended with status {self._process.returncode}; "
            f"what it said of this is above"
        )


def task_given() -> Task:
    """The task that a worker was started with, its last argument."""
    return Task(**json.loads(sys.argv[-1]))
