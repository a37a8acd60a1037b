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

CONFIG, ENVIRONMENT, LOCK = "config.json", "environment.jsonl", ".lock"
UNFINISHED = ".unfinished"
LIBRARIES = (
    "sae_jax jax jaxlib flax optax orbax-checkpoint transformers datasets grain numpy"
).split()


class RunFolder:
    """A folder that belongs to one configuration, and to one process at a time.

    Args:
        path: Where; made if missing.
        config: All settings, as plain values.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]):
        self.path = Path(path).expanduser()
        fault = folder_fault(self.path, config)
        if fault:
            raise ValueError(fault)
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
        if not (self.path / CONFIG).exists():
            write_whole(self.path / CONFIG, json.dumps(config, indent=1) + "\n")
        with (self.path / ENVIRONMENT).open("a") as file:
            file.write(json.dumps(environment()) + "\n")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def close(self) -> None:
        """Lets another process in."""
        self._lock.close()


def folder_fault(path: str | Path, config: dict[str, Any]) -> str | None:
    """Why a run with this configuration cannot use the folder; None if it can."""
    path = Path(path).expanduser()
    if not path.exists():
        return None
    if not path.is_dir():
        return f"{path} is a file; a run needs a folder."
    if not (path / CONFIG).exists():
        # What a process leaves that was killed before the settings were written.
        begun = (LOCK, f"{CONFIG}{UNFINISHED}")
        if any(entry.name not in begun for entry in path.iterdir()):
            return f"{path} is not empty and holds no run; choose another folder."
        return None
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


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: value
        for key, inner in values.items()
        for name, value in flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


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
