"""A job of several processes on this machine: started, watched, ended together."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from sae_jax.run.stop import STOPPED


def run(command: Sequence[str], n: int) -> int:
    """Runs a command in n processes, each told its place; their status.

    A process that dies ends the job: which one and why is printed, and the others are
    killed, since they would wait for it. A SIGTERM is passed on, so that all save.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    place = ["--distributed", f"--coordinator={coordinator}", f"--processes={n}"]
    children = {}
    for i in range(n):
        child = subprocess.Popen([*command, *place, f"--process={i}"])
        children[child.pid] = i, child
    # Ctrl-C reaches the processes by itself, which save and end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(min(children), signal.SIGTERM))
    statuses = set()
    while children:
        pid, code = os.wait()
        if pid not in children:
            continue
        i, _ = children.pop(pid)
        status = os.waitstatus_to_exitcode(code)
        statuses.add(status)
        if status not in (0, STOPPED):
            print(f"process {i} of {n} {how(status)}", file=sys.stderr, flush=True)
            for _, child in children.values():
                child.kill()
                child.wait()
            return 1
    return max(statuses)


def how(status: int) -> str:
    """What became of a process, and of the job."""
    if status < 0:
        ended = f"was killed by {signal.Signals(-status).name}"
    else:
        ended = f"ended with status {status}"
    return f"{ended}, and the job with it"
