"""Where the time of a training step goes: a trace of some steps, and a table of it.

A folder of a profile holds what JAX's profiler writes, which Perfetto and TensorBoard
show, and `steps.json`: how many steps were traced, how long they took, and what each
operation was compiled from.
"""

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

WARM = 5  # steps before the trace: buffers are there, and pages are touched
NOTES = "steps.json"


class Row(NamedTuple):
    """One operation of a compiled program.

    Attributes:
      program: the function that was compiled.
      op: its name in XLA, which numbers alike ones.
      source: what it was compiled from, as JAX names it; empty if not known.
      ms: milliseconds per step on its thread, without the operations inside it.
      share: of the time of all operations.
    """

    program: str
    op: str
    source: str
    ms: float
    share: float


class Profile:
    """Traces some steps of a loop, once the first ones are over.

    Args:
      folder: where the trace goes.
      steps: how many steps to trace.
      warm: how many pass before.
    """

    def __init__(self, folder: str | Path, steps: int, warm: int = WARM):
        if steps < 1:
            raise ValueError(f"steps={steps} traces nothing; give at least 1.")
        self.folder, self._first, self._last = Path(folder), warm, warm + steps
        self._begun, self._began = 0, 0.0
        self._sources: dict[str, str] = {}
        self._running = False

    def explain(self, programs: Iterable[Any]) -> None:
        """Notes what the operations of compiled programs were made from."""
        for program in dict.fromkeys(programs):
            for op, source in sources(program.as_text()):
                known = self._sources.setdefault(op, source)
                if source not in known.split(" or "):  # programs of one name
                    self._sources[op] = f"{known} or {source}"

    def between_steps(self, state: Any, last: bool = False) -> None:
        """To be called before the first step and after every one, with its outcome.

        What is done between two calls counts as part of a step.
        """
        if last or self._begun == self._last:
            self.end(state)
        elif self._begun == self._first:
            jax.block_until_ready(state)
            start(self.folder)
            self._running, self._began = True, time.perf_counter()
        self._begun += not last

    def end(self, state: Any) -> None:
        """Writes the trace, if one is on; also where training fails."""
        if not self._running:
            return
        jax.block_until_ready(state)
        seconds, self._running = time.perf_counter() - self._began, False
        jax.profiler.stop_trace()
        steps = self._begun - self._first
        notes = {"steps": steps, "seconds": seconds, "sources": self._sources}
        (self.folder / NOTES).write_text(json.dumps(notes, indent=1) + "\n")


def start(folder: Path) -> None:
    """Begins a trace of what the device does.

    Python's own calls are left out: they are many, and to note them takes longer than
    to make them. What remains costs microseconds per operation.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(
        folder, create_perfetto_trace=True, profiler_options=options
    )


def sources(text: str) -> Iterator[tuple[str, str]]:
    """`program/op` and what it was compiled from, from a program's text."""
    program = re.match(r"HloModule ([^\s,]+)", text)
    pattern = r'^\s*(?:ROOT )?%?([\w.-]+) = .*?\bop_name="([^"]*)"'
    for op, source in re.findall(pattern, text, re.MULTILINE):
        if program and "/" in source:  # not a parameter
            yield f"{program[1]}/{op}", source.split("/", 1)[1]


def show(folder: Path) -> None:
    """Prints where the time of a step goes; a run may have been too near its end."""
    try:
        print(f"\n{text(folder)}", flush=True)
    except FileNotFoundError as error:
        print(f"\n{error}", flush=True)


def table(folder: str | Path) -> list[Row]:
    """The operations in the newest trace of a folder, longest first."""
    folder = Path(folder)
    traces = (folder / "plugins" / "profile").glob("*/perfetto_trace.json.gz")
    newest = max(traces, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None or not (folder / NOTES).exists():
        raise FileNotFoundError(
            f"{folder} holds no trace of whole steps; train with --profile=N, and with "
            f"more than {WARM} steps to go"
        )
    notes = json.loads((folder / NOTES).read_text())
    with gzip.open(newest) as file:
        times = self_times(json.load(file)["traceEvents"])
    total = sum(times.values()) or 1
    rows = [
        Row(
            program.removeprefix("jit_"),
            op,
            notes["sources"].get(f"{program}/{op}", ""),
            time / 1e3 / notes["steps"],
            time / total,
        )
        for (program, op), time in times.items()
    ]
    return sorted(rows, key=lambda row: -row.ms)


def self_times(events: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Microseconds of each (program, operation), without what runs inside it.

    The profiler notes an operation as an event of the thread that runs it; the body of
    a loop, and waiting for other threads, as events within that event.
    """
    threads = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            threads[event["pid"], event["tid"]].append(event)
    times: dict[tuple[str, str], float] = defaultdict(float)
    for thread in threads.values():
        around: list[tuple[float, tuple[str, str] | None]] = []  # (end, operation)
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            end = event["ts"] + event["dur"]
            if around:
                end = min(end, around[-1][0])  # clocks are rounded
                if around[-1][1]:
                    times[around[-1][1]] -= end - event["ts"]
            known = event.get("args", {})
            operation = None
            if "hlo_op" in known:
                operation = known.get("hlo_module", ""), known["hlo_op"]
                times[operation] += end - event["ts"]
            around.append((end, operation))
    return dict(times)


def text(folder: str | Path, top: int = 15) -> str:
    """The table as it is printed."""
    rows = table(folder)
    notes = json.loads((Path(folder) / NOTES).read_text())
    clock = notes["seconds"] / notes["steps"] * 1e3
    lines = [
        f"Traced steps: {notes['steps']}, of {clock:.2f} ms by the clock; operations "
        f"on all threads: {sum(row.ms for row in rows):.2f} ms a step",
        f"{'ms':>9} {'share':>6}  {'program':<10} {'operation':<34} compiled from",
    ]
    shown = rows[:top]
    if rows[top:]:
        rest = [sum(row.ms for row in rows[top:]), sum(row.share for row in rows[top:])]
        shown.append(Row("", f"{len(rows) - top} others", "", *rest))
    lines += [
        f"{row.ms:9.3f} {row.share:6.1%}  {row.program:<10} {row.op:<34} {row.source}"
        for row in shown
    ]
    return "\n".join(line.rstrip() for line in lines)
