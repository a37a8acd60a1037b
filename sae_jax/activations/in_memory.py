"""Batches from arrays or from any iterator, where no language model is needed."""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae_jax import checks
from sae_jax.activations.from_shards import shuffled
from sae_jax.share import WHOLE, Share


class InMemory:
    """Batches of arrays `{site: [N, D]}`, which have a row in common at each index.

    Args:
        arrays: Activations by site, and gradients by the names of `gradient_of`.
        batch: Rows per batch, those of other shares included.
        seed: Decides the order of the rows, another one in each epoch.
        share: Which rows of each batch are taken.
    """

    def __init__(
        self,
        arrays: Mapping[str, Float[Array | np.ndarray, "N _"]],
        *,
        batch: int,
        seed: int = 0,
        share: Share = WHOLE,
    ):
        self.arrays = dict(arrays)
        if not self.arrays:
            raise ValueError("no activations were given: an array for each site")
        n_rows = _checked(self.arrays)
        whole = {"batch": batch, "seed": seed}
        faults = (checks.value_fault(name, v, int) for name, v in whole.items())
        checks.raise_all(filter(None, faults))
        if not 0 < batch <= n_rows:
            raise ValueError(
                f"batch={batch} must be from 1 to the {n_rows} rows that there are"
            )
        checks.raise_all(share.faults(batch=batch))
        self.batch, self._order = batch, shuffled(n_rows, batch, seed, share)
        # Taken once: reading an array of the device's would wait for what it does.
        begin = {s: np.asarray(a[:64]).tobytes() for s, a in self.arrays.items()}
        self._made_by = {
            "rows": n_rows,
            "first_rows": {site: zlib.crc32(rows) for site, rows in begin.items()},
            "batch": batch,
            "seed": seed,
        }

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        return {site: array.shape[1] for site, array in self.arrays.items()}

    def batches(
        self, start: int = 0, position: Any = None
    ) -> Iterator[dict[str, Float[Array, "_ D"]]]:
        """Batches from number `start` on, or this share of them, without end.

        `position` is only compared.
        """
        if position is not None and position != self._made_by:
            raise ValueError(
                f"the position belongs to other arrays, or to another order: "
                f"{checks.changed(position, self._made_by)}"
            )
        for t in itertools.count(start):
            rows = self._order[t]
            yield {
                site: jnp.asarray(array[rows], jnp.float32)
                for site, array in self.arrays.items()
            }

    def position(self, t: int) -> Any:
        """What the arrays are, by size and first rows; t itself finds the batch."""
        return self._made_by


class Given:
    """Batches as an iterator gives them: arrays `[B, D]`, or `{site: [B, D]}`.

    They are used once, in their order, and cannot be found again after a stop. All are
    of the first one's shape; a last one with another number of rows is left over.
    """

    def __init__(self, batches: Iterable[Any], site: str):
        self._batches = iter(batches)
        self._site = site
        first = next(self._batches, None)
        if first is None:
            raise ValueError("the iterator of activations gives none")
        self._first: dict[str, Array] | None = self._named(first)
        self._shapes = {site: rows.shape for site, rows in self._first.items()}
        self.batch = len(next(iter(self._first.values())))

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        return {site: width for site, (_, width) in self._shapes.items()}

    def batches(
        self, start: int = 0, position: Any = None
    ) -> Iterator[dict[str, Float[Array, "B D"]]]:
        """All batches, once."""
        if start or self._first is None:
            raise ValueError(
                f"an iterator cannot go back or on to batch {start}; train from "
                f"arrays, shards or a language model where a run is to be resumed"
            )
        first, self._first = self._first, None
        yield first
        for number, batch in enumerate(self._batches, start=1):
            rows = self._named(batch)
            shapes = {site: array.shape for site, array in rows.items()}
            if shapes != self._shapes:
                widths = {site: shape[1] for site, shape in shapes.items()}
                if widths == self.widths and next(self._batches, None) is None:
                    return
                raise ValueError(
                    f"batch {number} has shapes {shapes}, the first had "
                    f"{self._shapes}; give all the same"
                )
            yield rows

    def position(self, t: int) -> Any:
        """Nothing leads back into an iterator."""
        return None

    def _named(self, batch: Any) -> dict[str, Array]:
        named = dict(batch) if isinstance(batch, Mapping) else {self._site: batch}
        _checked(named)
        return {s: jnp.asarray(a, jnp.float32) for s, a in named.items()}


def _checked(arrays: Mapping[str, Any]) -> int:
    """Checks rows of floats, as many for each site; says how many."""
    for site, array in arrays.items():
        shape: tuple[int, ...] = getattr(array, "shape", ())
        if len(shape) != 2:
            given = f"has shape {shape}" if shape else f"is a {type(array).__name__}"
            raise ValueError(f"{site} {given}; give an array of shape [rows, width]")
        checks.rows(site, array, shape[1])
    lengths = {site: len(array) for site, array in arrays.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(f"the sites must have as many rows each, they have {lengths}")
    return next(iter(lengths.values()))
