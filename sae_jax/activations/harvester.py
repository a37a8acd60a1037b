"""From a block of text to the activations of its rows, on the device.

Where asked for, the gradients of the model's loss at its sites come with them, by the
names that `gradient_of` gives: one backward pass for all sites, and losses summed, so
that a row's gradient does not depend on what else is harvested.

Contexts that end early run together with others of about their length, so that little
is computed at padding. How long a pass is follows from a context's own length alone: a
row is the same to the last bit whatever stands beside it.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae_jax.lm.sites import gradient_of
from sae_jax.lm.source import Source
from sae_jax.text.blocks import Block

SHORTEST = 128  # tokens of a pass, below which padding costs little; not measured


@dataclasses.dataclass(frozen=True, eq=False)
class Harvester:
    """A language model, the sites to read in one pass, and how many contexts at once.

    `lm` is any source; `gradients` are those of the sites whose gradients come along.
    """

    lm: Source
    sites: tuple[str, ...]
    contexts_per_pass: int = 16
    dtype: str = "float32"
    gradients: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.sites or self.contexts_per_pass < 1:
            raise ValueError(
                f"sites={self.sites} and contexts_per_pass={self.contexts_per_pass}: "
                f"at least one of each is needed"
            )
        unread = sorted(set(self.gradients) - set(self.sites))
        if unread:
            raise ValueError(
                f"gradients={self.gradients}: {', '.join(unread)} is not read; add it "
                f"to sites={self.sites}"
            )

    @cached_property
    def widths(self) -> dict[str, int]:
        """The width of each site, and of each gradient by its name."""
        widths = {site: self.lm.width(site) for site in self.sites}
        return widths | {gradient_of(site): widths[site] for site in self.gradients}

    @property
    def made_by(self) -> dict[str, Any]:
        """What decides the values, in plain values."""
        return {
            "lm": self.lm.name,
            "weights": self.lm.fingerprint,
            "sites": self.widths,
            "dtype": self.dtype,
        }

    def rows(self, block: Block) -> dict[str, Float[Array, "R D"]]:
        """The activations of the block's rows, in their order, and gradients beside.

        No more is held than the rows themselves and one pass of the model.
        """
        n_rows = len(block.row)
        n, length = block.tokens.shape
        # Where each position of each context goes; unused ones out of range.
        target = np.full((n, length), n_rows, np.int32)
        target[block.row, block.column] = np.arange(n_rows, dtype=np.int32)
        buffers = {
            site: jnp.zeros((n_rows, width), self.dtype)
            for site, width in self.widths.items()
        }
        real = block.real.astype(np.float32)
        for part, size in _alike(block.real.sum(1), self.contexts_per_pass, length):
            missing = ((0, self.contexts_per_pass - len(part)), (0, 0))
            tokens, weights = (
                np.pad(array[part, :size], missing) for array in (block.tokens, real)
            )
            places = np.pad(target[part, :size], missing, constant_values=n_rows)
            buffers = _scatter(buffers, self._pass(tokens, weights), places)
        return buffers

    def _pass(
        self, tokens: Int[np.ndarray, "B T"], real: Float[np.ndarray, "B T"]
    ) -> dict[str, Float[Array, "B T _"]]:
        """One pass of the model, and back again for gradients."""
        if not self.gradients:
            return self.lm.run(tokens, read=self.sites).values
        # Padding predicts nothing, so its losses count for nothing.
        run, found = self.lm.gradients(tokens, self.sites, weights=real[:, 1:])
        beside = {gradient_of(site): found[site] for site in self.gradients}
        return {**run.values, **beside}


def _alike(
    lengths: Int[np.ndarray, " N"], n: int, longest: int
) -> Iterator[tuple[Int[np.ndarray, " m"], int]]:
    """Contexts of one pass, at most n, and the length that all of them have room in.

    A power of two, so that there are few programs, or the longest.
    """
    powers = 2 ** np.ceil(np.log2(np.maximum(lengths, SHORTEST))).astype(int)
    sizes = np.minimum(powers, longest)
    for size in np.unique(sizes):
        which = np.flatnonzero(sizes == size)
        for start in range(0, len(which), n):
            yield which[start : start + n], int(size)


@partial(jax.jit, donate_argnums=0)
def _scatter(buffers, values, target):
    """Writes the used positions of one pass into the buffers."""
    return {
        site: buffer.at[target.reshape(-1)].set(
            values[site].reshape(-1, buffer.shape[1]).astype(buffer.dtype), mode="drop"
        )
        for site, buffer in buffers.items()
    }
