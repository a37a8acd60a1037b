"""What a run writes down while it trains: JSON lines, TensorBoard, wandb.

`metrics.jsonl` holds nothing that depends on the clock: a run that is killed and goes
on leaves the same bytes as one that never was. Lines of steps that are to be done again
are dropped when it starts again.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sae_jax.whole_files import write_whole

Line = Mapping[str, Any]
NOT_METRICS = ("step", "sae", "kind")


@runtime_checkable
class Log(Protocol):
    """Where metrics go."""

    def write(self, line: Line) -> None:
        """Notes a line: after `step` steps, for one `sae`, of a `kind`, its metrics."""
        ...

    def flush(self) -> None:
        """Returns when all of it is safe."""
        ...

    def close(self) -> None:
        """Lets go of files and threads."""
        ...


class JsonLines:
    """A file of one JSON object a line.

    Args:
        path: The file.
        start: Lines of this step and later ones are dropped.
    """

    def __init__(self, path: Path, start: int):
        kept = [line for line in read_lines(path) if line["step"] < start]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, line: Line) -> None:
        """See `Log`."""
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """See `Log`."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """See `Log`."""
        self._file.close()


class Timing:
    """When windows of steps ended, and their speed; lines stay when a run goes on.

    The device works behind the program by up to a window, so a line alone can be off.
    """

    def __init__(self, path: Path):
        self._file = path.open("a")
        self._last: tuple[int, float] | None = None

    def note(self, step: int, rows: int) -> None:
        """A window has ended; `rows` were seen so far."""
        now, speed = time.time(), None
        if self._last and now > self._last[1]:
            speed = (rows - self._last[0]) / (now - self._last[1])
        self._last = rows, now
        line = {"step": step, "time": now, "rows_per_s": speed}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


class TensorBoard:
    """Event files, one folder for each SAE."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX import SummaryWriter

        # Files are named by the second: a run that goes on at once needs more.
        suffix = f".{time.time_ns()}"
        self._open = lambda name: SummaryWriter(
            str(folder / name), purge_step=start, filename_suffix=suffix
        )
        self._writers: dict[str, Any] = {}

    def write(self, line: Line) -> None:
        """See `Log`."""
        name = line["sae"]
        if name not in self._writers:
            self._writers[name] = self._open(name)
        for tag, value in tagged(line).items():
            self._writers[name].add_scalar(tag, value, line["step"])

    def flush(self) -> None:
        """See `Log`."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """See `Log`."""
        for writer in self._writers.values():
            writer.close()


class Wandb:
    """Weights & Biases, an optional package; the run's id stays in its folder."""

    def __init__(self, folder: Path, project: str, config: dict[str, Any]):
        import wandb

        known = folder / "wandb_id"
        if not known.exists():
            write_whole(known, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            dir=str(folder),
            id=known.read_text(),
            name=folder.resolve().name,
            resume="allow",
            config=config,
        )

    def write(self, line: Line) -> None:
        """See `Log`."""
        metrics = {f"{line['sae']}/{tag}": v for tag, v in tagged(line).items()}
        self._run.log(metrics, step=line["step"])

    def flush(self) -> None:
        """It has a thread of its own."""

    def close(self) -> None:
        """See `Log`."""
        self._run.finish()


def tagged(line: Line) -> dict[str, float]:
    """The metrics of a line that are numbers, named `kind/metric`."""
    return {
        f"{line['kind']}/{name}": value
        for name, value in line.items()
        if name not in NOT_METRICS and isinstance(value, int | float)
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may end in the middle of one."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plain(value: Any) -> Any:
    """A number that JSON can hold: null where it is not finite."""
    value = value.item() if hasattr(value, "item") else value  # an array's scalar
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
