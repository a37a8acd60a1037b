"""Systems of `bench_ensemble` that take turns, and the rows that come of it.

A system may be several processes, which take each turn together.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

from experiments._bench_timing import in_turn, milliseconds, within_rounds
from experiments._bench_workers import Worker

# How the printed table has what a row says.
COLUMNS = {
    "rule": ">22",
    "measured": ">8",
    "n": ">3",
    "how": ">12",
    "ms": ">9",
    "ms_min": ">9",
    "ms_max": ">9",
    "throughput": ">10",
    "compile_s": ">9",
    "tokens_per_s": ">12",
    "peak_mb": ">8",
}


class Turns(NamedTuple):
    """What was found of one rule.

    Attributes:
      measured: steps or tokens.
      batch, width: of the rows.
      steps: of all SAEs, in a turn.
      seconds: of each turn, by system; the others are held against the first.
      compile_s: seconds of compiling, by system; empty where that is not measured.
      peak_mb: memory of its processes in their turns, by system; likewise.
    """

    measured: str
    batch: int
    width: int
    steps: int
    seconds: Mapping[str, Sequence[float]]
    compile_s: Mapping[str, float] = {}
    peak_mb: Mapping[str, float] = {}


def rows(columns: Mapping[str, Any], turns: Turns) -> list[dict[str, Any]]:
    """One for each system, with the given columns in front."""
    found = []
    base = next(iter(turns.seconds.values()))
    for how, seconds in turns.seconds.items():
        steps = [s / turns.steps for s in seconds]
        tokens = turns.steps * turns.batch / statistics.median(seconds)
        compile_s, peak_mb = turns.compile_s.get(how), turns.peak_mb.get(how)
        found.append(
            {
                **columns,
                "measured": turns.measured,
                "how": how,
                "B": turns.batch,
                "D": turns.width,
                "ms": milliseconds(statistics.median(steps)),
                "ms_min": milliseconds(min(steps)),
                "ms_max": milliseconds(max(steps)),
                "throughput": round(within_rounds(base, seconds), 3),
                "compile_s": None if compile_s is None else round(compile_s, 2),
                "tokens_per_s": round(tokens) if turns.measured == "tokens" else None,
                "peak_mb": None if peak_mb is None else round(peak_mb),
            }
        )
    return found


def taken(
    systems: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """The seconds of all turns: one of each system per round, another first."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for i in range(rounds):
        for name in in_turn(list(systems), i):
            seconds[name].append(systems[name]())
    return seconds


def started(stack: ExitStack, module: str, tasks: Sequence[Any]) -> list[Worker]:
    """A process for each task, all ready; they end with the stack."""
    command = [module]
    with ThreadPoolExecutor(len(tasks)) as pool:
        coming = [
            pool.submit(Worker, sys.executable, command, task, {}) for task in tasks
        ]
    for one in coming:
        if one.exception() is None:
            stack.enter_context(one.result())  # so it ends also if another has failed
    return [one.result() for one in coming]


def until_the_last(workers: Sequence[Worker]) -> float:
    """The seconds of one turn of all, at the same time."""
    with ThreadPoolExecutor(len(workers)) as pool:
        began = time.perf_counter()
        for _ in pool.map(Worker.step, workers):
            pass
        return time.perf_counter() - began
