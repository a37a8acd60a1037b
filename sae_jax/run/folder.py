"""The folder that a run leaves.

config.json        every setting, resolved; a run only goes on with the same ones
environment.jsonl  a line for each start: versions, git commit, command, devices
metrics.jsonl      training and evaluation; the same bytes however often resumed
timing.jsonl       speed, which is another each time
tensorboard/       the same metrics for TensorBoard
checkpoints/       the state of training
saes/NAME/         the trained SAEs
figures/, report.html, results.csv
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sae_jax import checks
from sae_jax.run import hosts
from sae_jax.whole_files import UNFINISHED, write_whole

CONFIG, ENVIRONMENT, LOCK = "config.json", "environment.jsonl", ".lock"
# What is there before anything was trained, which claims no folder.
PRELIMINARY = {LOCK, CONFIG, CONFIG + UNFINISHED, ENVIRONMENT}
EMPTY_AT_FIRST = {"checkpoints", "metrics.jsonl", "timing.jsonl"}
LIBRARIES = (
    "sae_jax jax jaxlib flax optax orbax-checkpoint transformers datasets grain numpy"
).split()


class RunFolder:
    """A folder that belongs to one configuration, and to one run at a time.

    Args:
        path: Where; made if missing.
        config: All settings, as plain values.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]):
        self.path = Path(path).expanduser()
        if hosts.first():
            self._claim(config)
        hosts.wait_for_all("the run's folder")
        if not (self.path / CONFIG).exists():
            raise ValueError(
                f"{self.path} was made by the first process and is not there for "
                f"process {jax.process_index()}; take a file system that all share"
            )

    def _claim(self, config: dict[str, Any]) -> None:
        checks.raise_all(filter(None, [folder_fault(self.path, config)]))
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"another process is training in {self.path}; wait for it, or choose "
                f"another folder"
            ) from None
        # Once more: another process may have come and gone before the lock.
        checks.raise_all(filter(None, [folder_fault(self.path, config)]))
        write_whole(self.path / CONFIG, json.dumps(config, indent=1) + "\n")
        with (self.path / ENVIRONMENT).open("a") as file:
            file.write(json.dumps(environment()) + "\n")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def close(self) -> None:
        """Lets another run in."""
        if hosts.first():
            self._lock.close()


def folder_fault(path: str | Path, config: dict[str, Any]) -> str | None:
    """Why a run with this configuration cannot use the folder; None if it can."""
    path = Path(path).expanduser()
    if not path.exists():
        return None
    if not path.is_dir():
        return f"{path} is a file; a run needs a folder."
    if all(map(is_preliminary, path.iterdir())):
        return None  # nothing was trained there yet
    if not (path / CONFIG).exists():
        return f"{path} is not empty and holds no run; choose another folder."
    try:
        before = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        return f"{path / CONFIG} is damaged: {error}"
    differ = checks.changed(flat(before), flat(json.loads(json.dumps(config))))
    if differ:
        return (
            f"{path} holds a run with other settings: {differ}. Give the same settings "
            f"to go on with it, or choose another folder."
        )
    return None


def is_preliminary(entry: Path) -> bool:
    """Whether a run that failed before its first window may have left it."""
    if entry.name not in EMPTY_AT_FIRST:
        return entry.name in PRELIMINARY
    return not any(entry.iterdir()) if entry.is_dir() else entry.stat().st_size == 0


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: value
        for key, inner in values.items()
        for name, value in flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def environment() -> dict[str, Any]:
    """Where and with what this process runs."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": [str(device) for device in jax.devices()],
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit that the package's files are of, with '+' if they were changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
