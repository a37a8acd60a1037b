"""Training steps in a benchmark's hands: those of a run's loop, without its duties."""

import itertools
import time
from collections.abc import Iterator

import jax

from sae_jax.run.groups import Groups
from sae_jax.run.members import Rows


class Steps:
    """Takes steps of all SAEs on batches as they come, so many at a time.

    Attributes:
      compile_s: seconds until their programs were compiled.
    """

    def __init__(self, groups: Groups, batches: Iterator[Rows]) -> None:
        rows = next(batches)
        self._groups, self._batches = groups, itertools.chain([rows], batches)
        self._held = groups.fresh(rows)
        began = time.perf_counter()
        self._steps = groups.compile(self._held, rows)
        self.compile_s = time.perf_counter() - began

    def __call__(self, n: int) -> float:
        """The seconds of n steps, and of drawing their batches."""
        began = time.perf_counter()
        for rows in itertools.islice(self._batches, n):
            self._held = self._groups.step(self._steps, self._held, rows, False)
        jax.block_until_ready(self._held)
        return time.perf_counter() - began
