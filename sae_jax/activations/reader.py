"""One reader's batches: its text in blocks, its rows in an order that mixes them.

Activations stay on the device. The text is cut into blocks of R rows. Each block is
permuted by a key of its own and halved; group g, from which R / B batches are drawn in
a keyed order, is the second half of block g and the first half of block g + 1. So
every row meets rows of two blocks, and batch t needs two blocks and nothing older: a
run that resumes at t harvests two blocks and goes on bit for bit. (The first half of
block 0 is in no group.) At most three times R rows are held.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sae_jax.activations.harvester import Harvester
from sae_jax.text.blocks import Block, Place, blocks
from sae_jax.text.contexts import Packing
from sae_jax.text.documents import Documents


class Reader:
    """Batches of one text, and the places in it that lead back to them.

    Args:
        harvester: The model and the sites.
        documents: The text.
        tokenizer: The model's tokenizer.
        packing: How documents become contexts.
        batch: Rows per batch.
        buffer: Rows per block; an even multiple of `batch`.
        key: Decides the order of the rows.
    """

    def __init__(
        self,
        harvester: Harvester,
        documents: Documents,
        tokenizer: Any,
        packing: Packing,
        *,
        batch: int,
        buffer: int,
        key: Key[Array, ""],
    ):
        self.harvester, self.batch, self.buffer = harvester, batch, buffer
        self._blocks = partial(blocks, documents, tokenizer, packing, buffer)
        self._key = key
        self._places: dict[int, Place | None] = {0: None}

    def batches(
        self, start: int, place: Place | None
    ) -> Iterator[dict[str, Float[Array, "B D"]]]:
        """Batches from number `start` on, by `place(start)` of an earlier reader.

        Without it the text is tokenised from its beginning. Ends when the text ends,
        with what does not fill a block left over.
        """
        first = 0 if place is None else start // (self.buffer // self.batch)
        self._places[first] = place
        return self._draw(start, first, place)

    def _draw(
        self, start: int, first: int, place: Place | None
    ) -> Iterator[dict[str, Float[Array, "B D"]]]:
        group, index = divmod(start, self.buffer // self.batch)
        half = None
        for number, block in enumerate(_ahead(self._blocks(place)), start=first):
            if len(block.row) < self.buffer:
                return
            self._places[number] = block.place
            self._places.pop(number - 3, None)
            if number < group:
                continue
            rows = self.harvester.rows(block)
            if half is None:
                half = _second_half(rows, self._key, number)
                continue
            mixed, half = _mix(half, rows, self._key, number)
            del rows
            for i in range(index, self.buffer // self.batch):
                yield _slice(mixed, i, self.batch)
            del mixed
            index = 0

    def place(self, t: int) -> Place | None:
        """Where the text of batch `t` begins; None: where all text begins.

        Known for the batches around the last one that was drawn.
        """
        group = t // (self.buffer // self.batch)
        if group not in self._places:
            raise ValueError(
                f"the place of batch {t} is not known; known are those of groups "
                f"{sorted(self._places)} of {self.buffer // self.batch} batches"
            )
        return self._places[group]


class _Order(NamedTuple):
    """Two random orders per block: of its own rows, and of the group it completes."""

    own: Array
    group: Array


def _order(key: Array, number: Array, n: int) -> _Order:
    own, group = jax.random.split(jax.random.fold_in(key, number))
    return _Order(jax.random.permutation(own, n), jax.random.permutation(group, n))


@jax.jit
def _second_half(rows, key, number):
    """The rows of a block that belong to the group which begins with it."""
    n = jax.tree.leaves(rows)[0].shape[0]
    chosen = _order(key, number, n).own[n // 2 :]
    return jax.tree.map(lambda x: x[chosen], rows)


@jax.jit
def _mix(half, rows, key, number):
    """A whole group, in its final order, and the half that is kept for the next."""
    n = jax.tree.leaves(rows)[0].shape[0]
    own, order = _order(key, number, n)

    def group(old, new):
        return jnp.concatenate([old, new[own[: n // 2]]])[order]

    mixed = jax.tree.map(group, half, rows)
    return mixed, jax.tree.map(lambda x: x[own[n // 2 :]], rows)


@partial(jax.jit, static_argnums=2)
def _slice(rows, index, size):
    """Batch `index` of a group."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), rows
    )


def _ahead(items: Iterator[Block]) -> Iterator[Block]:
    """The same items, each made in the background while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
