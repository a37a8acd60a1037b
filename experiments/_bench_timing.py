"""One configuration of `bench`: workers that take turns, and the rows they make."""

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments._bench_workers import Task, Worker

OURS, FLOOR = "sae_jax", "encoder matmul"
FEWEST_ROUNDS = 3
PAUSE = 0.02  # seconds; threads of the system before still spin for a moment
# Each column of a row, and how the printed table has it.
COLUMNS = {
    "rule": ">18",
    "B": ">5",
    "D": ">5",
    "F": ">6",
    "k": ">5",
    "pieces": ">6",
    "ms": ">8",
    "ms_min": ">8",
    "ms_max": ">8",
    "peer": ">14",
    "ratio_to_peer": ">14",
    "ratio_to_encoder_matmul": ">24",
    "peak_mb": ">8",
    "peer_peak_mb": ">13",
    "peer_ms": ">8",
    "compile_s": ">10",
}


class Timed(NamedTuple):
    """What was found of one configuration.

    Attributes:
      seconds: of each round, by system.
      peak_mb: memory over that of the bare process, by system.
      first_mse: the mean-MSE of the first batch, by system; not of the floor.
      compile_s: seconds of our first step.
      versions: of all libraries.
      device: what ours ran on.
    """

    seconds: dict[str, list[float]]
    peak_mb: dict[str, float]
    first_mse: dict[str, float]
    compile_s: float
    versions: dict[str, str]
    device: str


def measure(
    commands: Mapping[str, tuple[str, ...]],
    task: Task,
    rounds: int,
    seconds: float,
    env: Mapping[str, str],
) -> Timed:
    """Starts the workers and asks each for a step per round, another first each time.

    No new round begins once `seconds` are used, unless fewer than 3 were.
    """
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(python, command, task, env))
            for name, (python, *command) in commands.items()
        }
        began = time.perf_counter()
        for i in range(rounds):
            if i >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
            for name in in_turn(list(workers), i):
                time.sleep(PAUSE)
                workers[name].step()
    hellos = {name: worker.hello for name, worker in workers.items()}
    return Timed(
        seconds={name: worker.seconds for name, worker in workers.items()},
        peak_mb={n: w.peak_mb - w.hello["bare_mb"] for n, w in workers.items()},
        first_mse={n: h["mse"] for n, h in hellos.items() if math.isfinite(h["mse"])},
        compile_s=hellos[OURS]["first"],
        versions={k: v for h in hellos.values() for k, v in h["versions"].items()},
        device=hellos[OURS]["device"],
    )


def in_turn(names: list[str], i: int) -> list[str]:
    """The names, beginning with another one in each round."""
    first = i % len(names)
    return names[first:] + names[:first]


def within_rounds(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of our time over theirs in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def in_rows(columns: Mapping[str, Any], timed: Timed) -> list[dict[str, Any]]:
    """One row per peer; one without a peer if there is none."""
    ours = timed.seconds[OURS]
    peers = [name for name in timed.seconds if name not in (OURS, FLOOR)]
    rows = []
    for peer in peers or [None]:
        theirs = timed.seconds[peer] if peer else None
        rows.append(
            {
                **columns,
                "ms": milliseconds(statistics.median(ours)),
                "ms_min": milliseconds(min(ours)),
                "ms_max": milliseconds(max(ours)),
                "peer": peer,
                "ratio_to_peer": theirs and round(within_rounds(ours, theirs), 3),
                "ratio_to_encoder_matmul": round(
                    within_rounds(ours, timed.seconds[FLOOR]), 3
                ),
                "peak_mb": round(timed.peak_mb[OURS]),
                "peer_peak_mb": peer and round(timed.peak_mb[peer]),
                "peer_ms": theirs and milliseconds(statistics.median(theirs)),
                "compile_s": round(timed.compile_s, 2),
            }
        )
    return rows


def where(machine: Mapping[str, Any]) -> str:
    """In words, what it ran on and when; see `bench.machine`."""
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return f"{device}, {machine['threads']} threads, {machine['date']}"


def milliseconds(seconds: float) -> float:
    """To a hundredth."""
    return round(seconds * 1e3, 2)


def line(row: Mapping[str, Any], columns: Mapping[str, str] = COLUMNS) -> str:
    """A row of the printed table."""
    shown = {n: "-" if v is None else str(v) for n, v in row.items()}
    return " ".join(f"{shown[name]:{form}}" for name, form in columns.items())
