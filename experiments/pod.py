"""Writes the scripts that train on a TPU pod, or on GPUs under SLURM.

All hosts run the same command, `launch.py --distributed ...`, and share the folder that
it writes to. The scripts were tested for syntax, quoting and order with commands that
only record what they were given; never on a pod, never under SLURM. PODS.md tells what
each is for.

Command:  python launch.py --experiment=pod --project=my-project --zone=us-west4-a
          --repository=https://example.org/sae_jax --share=10.0.0.2:/runs
          --arguments="--experiment=train --mesh=data:8,feature:4 --out=/mnt/runs/a"
Hardware: any; at once.
Leaves:   out/create.sh, set_up.sh, launch.sh, watch.sh, delete.sh; slurm.sh
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from experiments import _pod_scripts as scripts
from sae_jax.run.stop import STOPPED
from sae_jax.whole_files import write_whole

FAILURES = 3  # of the command in a row, on a slice that is there


@dataclass(frozen=True)
class Slurm:
    """A SLURM cluster. JAX wants one task for each GPU."""

    job: Annotated[str, "name of the job"] = "sae"
    nodes: Annotated[int, "hosts"] = 4
    tasks: Annotated[int, "tasks on a host"] = 8
    gpus: Annotated[int, "GPUs of a host"] = 8
    time: Annotated[str, "limit of the job, [days-]hours:minutes:seconds"] = "24:00:00"
    warning: Annotated[int, "seconds before that limit at which tasks are to save"] = (
        600
    )
    checkout: Annotated[str, "folder of the project, the same on all hosts"] = (
        "/shared/sae_jax"
    )


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/pod"
    name: Annotated[str, "of the slice"] = "sae"
    project: Annotated[str, "of Google Cloud"] = ""
    zone: Annotated[str, "where the slice is to be"] = ""
    accelerator_type: Annotated[str, "such as v5litepod-32, v5p-64, v4-64"] = (
        "v5litepod-32"
    )
    runtime_version: Annotated[str, "the hosts' image, which goes with the type"] = (
        "v2-alpha-tpuv5-lite"
    )
    spot: Annotated[bool, "whether the slice may be preempted, for a lower price"] = (
        True
    )
    repository: Annotated[str, "address of the project, for git clone"] = ""
    revision: Annotated[str, "commit, tag or branch; a commit stays the same"] = "HEAD"
    python: Annotated[str, "interpreter and Ubuntu package, 3.11 or newer"] = (
        "python3.11"
    )
    mount: Annotated[str, "where all hosts see the shared file system"] = "/mnt/runs"
    share: Annotated[str, "its address for NFS, such as Filestore's"] = ""
    arguments: Annotated[str, "of launch.py, as in a shell, --distributed apart"] = ""
    slurm: Slurm = Slurm()

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        for name in ("project", "zone", "repository", "share", "arguments"):
            if not getattr(self, name):
                yield f"{name} is needed: {said(name)}"
        for name in ("name", "python"):
            if not re.fullmatch(r"[a-z][a-z0-9.-]*", getattr(self, name)):
                text = getattr(self, name)
                yield f"{name}={text!r} must be of a-z, 0-9, '.' and '-', from a letter"
        if not PurePosixPath(self.mount).is_absolute():
            yield f"mount={self.mount!r} must begin with /"
        yield from self._wrong_arguments()
        yield from wrong_slurm(self.slurm)

    def _wrong_arguments(self) -> Iterator[str]:
        try:
            words = shlex.split(self.arguments)
        except ValueError as error:
            yield f"arguments={self.arguments!r} cannot be read by a shell: {error}"
            return
        if words and any(word.startswith("--distributed") for word in words):
            yield "arguments: --distributed is added by the scripts; leave it out"
        out = next((w[len("--out=") :] for w in words if w.startswith("--out=")), "")
        if words and not PurePosixPath(out).is_relative_to(self.mount):
            yield (
                f"arguments: --out={out} must be given and be below "
                f"mount={self.mount}, which all hosts share"
            )


def said(name: str) -> str:
    """What a setting is."""
    return str(Config.__annotations__[name].__metadata__[0])


def wrong_slurm(slurm: Slurm) -> Iterator[str]:
    """Values that `#SBATCH` lines cannot hold; no shell reads those."""
    if not re.fullmatch(r"[\w.-]+", slurm.job):
        yield f"slurm.job={slurm.job!r} must be of letters, digits, '_', '.' and '-'"
    if not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", slurm.time):
        yield f"slurm.time={slurm.time!r} is not [days-]hours:minutes:seconds"
    for name in ("nodes", "tasks", "gpus", "warning"):
        if getattr(slurm, name) < 1:
            yield f"slurm.{name} must be at least 1"


def texts(config: Config) -> dict[str, str]:
    """The scripts, by the names of their files."""
    words = shlex.split(config.arguments)
    names = "name accelerator_type runtime_version python mount share".split()
    names += ["repository", "revision"]
    values: dict[str, object] = {n: shlex.quote(getattr(config, n)) for n in names}
    values["where"] = scripts.words(
        [f"--zone={config.zone}", f"--project={config.project}"]
    )
    values["arguments"] = scripts.words(words)
    values |= {"spot": " --spot" if config.spot else "", "stopped": STOPPED}
    values["failures"] = FAILURES
    local, on_all = scripts.local, scripts.on_all
    slurm = {**vars(config.slurm), "checkout": shlex.quote(config.slurm.checkout)}
    return {
        "create.sh": local(
            "Asks for the slice, and waits until it is there.",
            scripts.STATE + scripts.CREATE,
            **values,
        ),
        "set_up.sh": on_all(
            "Mounts, clones and installs on all hosts.", scripts.SET_UP, values
        ),
        "launch.sh": on_all(
            "Starts the command on all hosts, or goes on.", scripts.LAUNCH, values
        ),
        "watch.sh": local(
            "Keeps a slice and runs the command on it until it ends well.",
            scripts.STATE + scripts.WATCH,
            **values,
        ),
        "delete.sh": local("Gives the slice back.", scripts.DELETE, **values),
        "slurm.sh": scripts.SLURM.format(
            what="sbatch slurm.sh: one job, queued again until it ends well.",
            **{**slurm, "arguments": values["arguments"], "stopped": STOPPED},
        ),
    }


def run(config: Config) -> None:
    """Writes the scripts."""
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts(config).items():
        write_whole(out / name, text)
        (out / name).chmod(0o755)
        print(out / name)
