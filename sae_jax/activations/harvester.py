"""From a block of text to the activations of its rows, on the device."""

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax.lm.source import Source
from sae_jax.text.blocks import Block


@dataclasses.dataclass(frozen=True, eq=False)
class Harvester:
    """A language model, the sites to read in one pass, and how many contexts at once.

    `lm` is any source.
    """

    lm: Source
    sites: tuple[str, ...]
    contexts_per_pass: int = 16
    dtype: str = "float32"

    def __post_init__(self):
        if not self.sites or self.contexts_per_pass < 1:
            raise ValueError(
                f"sites={self.sites} and contexts_per_pass={self.contexts_per_pass}: "
                f"at least one of each is needed"
            )

    @cached_property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        return {site: self.lm.width(site) for site in self.sites}

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
        """The activations of the block's rows, in their order.

        No more is held than the rows themselves and one pass of the model.
        """
        n_rows = len(block.row)
        n, length = block.tokens.shape
        step = self.contexts_per_pass
        tokens = np.zeros((-(-n // step) * step, length), np.int32)
        tokens[:n] = block.tokens
        # Where each position of each context goes; unused ones out of range.
        target = np.full(tokens.shape, n_rows, np.int32)
        target[block.row, block.column] = np.arange(n_rows, dtype=np.int32)
        buffers = {
            site: jnp.zeros((n_rows, width), self.dtype)
            for site, width in self.widths.items()
        }
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            values = self.lm.run(tokens[part], read=self.sites).values
            buffers = _scatter(buffers, values, target[part])
        return buffers


@partial(jax.jit, donate_argnums=0)
def _scatter(buffers, values, target):
    """Writes the used positions of one pass into the buffers."""
    return {
        site: buffer.at[target.reshape(-1)].set(
            values[site].reshape(-1, buffer.shape[1]).astype(buffer.dtype), mode="drop"
        )
        for site, buffer in buffers.items()
    }
