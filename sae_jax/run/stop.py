"""Ending early without losing work: SIGTERM, or Ctrl-C.

Python runs its own signal handlers between two bytecodes of the main thread, which is
minutes too late while the compiler or the device is at work. So the C-level handler
wakes a thread, through a socket, which has another one save and end the process: during
training, compilation, evaluation and harvesting alike.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from sae_jax.run import hosts

# EX_TEMPFAIL of sysexits.h: not finished; the same command goes on.
STOPPED = 75
INTERRUPTED = 130


def nothing_to_save() -> str:
    """Before the first step of this process, and after the last."""
    return "There was nothing to save."


def end_together(said: str) -> NoReturn:
    """Ends one of several processes, all of which have saved the same step."""
    if hosts.first():
        print(f"\nSIGTERM: {said}", file=sys.stderr, flush=True)
    raise SystemExit(STOPPED)


class Stop:
    """While it is entered, SIGTERM and SIGINT call `save` and end the process.

    The exit status is `STOPPED`; a second SIGINT does not wait for the save.

    Attributes:
      save: called on a thread of its own, with `lock` held; returns what to tell the
        user. The main thread holds the lock wherever a save would find things halfway.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.save: Callable[[], str] = nothing_to_save
        self._saving: threading.Thread | None = None

    def __enter__(self) -> "Stop":
        if hosts.several():  # they have to save the same step; see `hosts.told_to_end`
            return self
        self._wakes, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._woken.fileno())
        self._old = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if hosts.several():
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._woken.close()  # the thread reads the end, and ends
        self._thread.join()
        self._wakes.close()
        if self._saving:
            self._saving.join()

    def _handle(self, number: int, frame: object) -> None:
        """In place of Python's own handlers; the threads do the work."""

    def _watch(self) -> None:
        interrupts = 0
        while number := self._wakes.recv(1):
            if number[0] not in self._old:
                continue
            interrupts += number[0] == signal.SIGINT
            if interrupts > 1:
                os._exit(INTERRUPTED)
            if self._saving is None:
                name = signal.Signals(number[0]).name
                self._saving = threading.Thread(
                    target=self._save_and_end, args=(name,), daemon=True
                )
                self._saving.start()

    def _save_and_end(self, name: str) -> None:
        with self.lock:
            try:
                said = self.save()
            except Exception as error:
                said = f"Saving failed: {error}. The checkpoint before it stays."
            try:
                print(f"\n{name}: {said}", file=sys.stderr, flush=True)
                sys.stdout.flush()
            finally:  # also where whoever read it has gone
                os._exit(STOPPED)
