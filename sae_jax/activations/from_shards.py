"""Batches from harvested shards, through grain.

All rows of all shards are in one keyed shuffle, another one in each epoch. grain
computes the shuffle from the index, so batch t is found without the ones before it.
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax import checks
from sae_jax.activations.shards import Shards, identity
from sae_jax.share import WHOLE, Share

# Batches read ahead; grain's own default would hold 500 in memory.
EPOCHS = 1_000_000  # no run has more; grain's own endless number can overflow
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def shuffled(n_rows: int, batch: int, seed: int, share: Share = WHOLE) -> Any:
    """Row numbers in batches without end: grain's data set, open at every index.

    Batches are cut into as many parts as there are shares, of which this one takes its
    own.
    """
    order = grain.MapDataset.range(n_rows).seed(seed).shuffle().repeat(EPOCHS)
    parts = order.batch(batch // share.count)
    return parts.slice(slice(share.index, None, share.count))


class FromShards:
    """A stream of batches `{site: [batch, width]}` in float32.

    Args:
        shards: The opened folder.
        sites: Which of its sites, and gradients by their names; all by default.
        batch: Rows per batch, those of other shares included.
        seed: Decides the order of the rows.
        share: Which rows of each batch are read; no others are.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch: int,
        sites: tuple[str, ...] | None = None,
        seed: int = 0,
        share: Share = WHOLE,
    ):
        self.sites = tuple(sites or shards.widths)
        unknown = sorted(set(self.sites) - set(shards.widths))
        if unknown:
            raise ValueError(
                f"{shards.folder} holds no {', '.join(unknown)}; "
                f"it holds {', '.join(shards.widths)}"
            )
        if not 0 < batch <= len(shards):
            raise ValueError(f"batch={batch} must be from 1 to {len(shards)} rows")
        checks.raise_all(share.faults(batch=batch))
        self.shards, self.batch = shards, batch
        self._batches = shuffled(len(shards), batch, seed, share).map(self._read)

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        return {site: self.shards.widths[site] for site in self.sites}

    def batches(
        self, start: int = 0, position: Any = None
    ) -> Iterator[dict[str, Float[Array, "_ D"]]]:
        """Batches from number `start` on, or this share of them, without end.

        The `position` of an earlier run is only compared: same shards, as many rows.
        """
        if position is not None and position != self.position(start):
            raise ValueError(
                f"the position belongs to other shards, or {self.shards.folder} has "
                f"grown: {position} then, {self.position(start)} now"
            )
        rest = self._batches.slice(slice(start, None))
        for rows in rest.to_iter_dataset(READ_AHEAD):
            yield jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), rows)

    def position(self, t: int) -> Any:
        """What the shards are; the number of a batch is enough to find it."""
        shards = self.shards
        return {"rows": len(shards), "made_by": identity(shards.made_by)}

    def _read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return self.shards.rows(index, self.sites)
