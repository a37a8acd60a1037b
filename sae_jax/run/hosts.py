"""Several processes that train together, on one machine or on many.

JAX's own runtime joins them: a coordinator in the first one watches over all. When a
process dies, it is missed within `MISSED` seconds, and the runtime aborts the others.
Alone, a process is the first of one, and the functions here do nothing.
"""

import json
import os
import signal
import sys
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax.share import joined

MISSED = 30  # seconds without a sign of life
TO_JOIN = 300  # seconds that processes have for starting
TO_LEAVE = 24 * 3600  # and for ending after the first of them, which writes reports


def join(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Makes this process one of several; to be called before any device is used.

    Without arguments, all is taken from the environment of a TPU pod, SLURM, MPI or
    Kubernetes. What fails here ends the process: none goes on alone.
    """
    given = bool(coordinator), processes > 0, process >= 0
    if any(given) and not all(given):
        raise ValueError(
            "--coordinator=HOST:PORT, --processes=N and --process=I go together; "
            "without them, TPU pods, SLURM and MPI tell"
        )
    if all(given) and process >= processes:
        raise ValueError(f"--process={process} is not below --processes={processes}")
    if process > 0:
        print(f"process {process}: looking for {coordinator}", file=sys.stderr)
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes or None,
            process if process >= 0 else None,
            initialization_timeout=TO_JOIN,
            heartbeat_timeout_seconds=MISSED,
            shutdown_timeout_seconds=TO_LEAVE,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed finds no TPU pod, SLURM or MPI in the environment "
            f"({error}); give --coordinator=HOST:PORT, --processes=N and --process=I"
        ) from None
    there = jax.process_count()
    if processes and there != processes:
        raise ValueError(f"{there} processes have joined instead of {processes}")
    # The runtime itself waits for SIGTERM, at any process, and tells all of them.
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def several() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Returns when all processes are there."""
    if several():
        multihost_utils.sync_global_devices(where)


def all_agree(so: bool) -> bool:
    """Whether it is so for every process."""
    if not several():
        return so
    return bool(multihost_utils.process_allgather(np.asarray(so)).all())


def whole_position(position: Any) -> Any:
    """The position of the whole stream, of which each process has a share."""
    if not several():
        return position
    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    found = multihost_utils.process_allgather(padded)
    texts = (row[:n].tobytes() for row, n in zip(found, sizes, strict=True))
    return joined([json.loads(text) for text in texts])


def told_to_end(t: int) -> bool:
    """Whether some process was told to end, and step t is where all of them do.

    To be asked by all, before every step.
    """
    return several() and multihost_utils.reached_preemption_sync_point(t)


def leave(status: int) -> NoReturn:
    """Ends this process at once; the others are ended by the runtime."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
