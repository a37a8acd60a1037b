"""One reader's batches: its text in blocks, its rows in an order that mixes them.

Activations stay on the device. The text is cut into blocks of R rows, and these are
mixed to groups of R rows by one of the ways of `sae_jax.activations.mixing`; R / B
batches are drawn from each. What a group is made of follows from keys and from the last
blocks, two of them or a few more: a run that resumes harvests these and goes on bit for
bit. At most three times R rows are held, and while a group is mixed four.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from sae_jax.activations.harvester import Harvester
from sae_jax.activations.mixing import MIXINGS, Mixed
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
        mixing: Which blocks' rows meet in a batch.
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
        mixing: Mixed = "neighbours",
    ):
        self.harvester, self.batch, self.buffer = harvester, batch, buffer
        self._blocks = partial(blocks, documents, tokenizer, packing, buffer)
        self._key, self._mixing = key, MIXINGS[mixing]
        self._places: dict[int, Place | None] = {0: None}

    def batches(
        self, start: int, place: Place | None
    ) -> Iterator[dict[str, Float[Array, "B D"]]]:
        """Batches from number `start` on, by `place(start)` of an earlier reader.

        Without it the text is tokenised from its beginning. Ends when the text ends,
        with what does not fill a block left over.
        """
        group = start // (self.buffer // self.batch)
        first = 0 if place is None else self._oldest(group)
        self._places[first] = place
        return self._draw(start, first, place)

    def _draw(
        self, start: int, first: int, place: Place | None
    ) -> Iterator[dict[str, Float[Array, "B D"]]]:
        group, index = divmod(start, self.buffer // self.batch)
        oldest, held, number = self._oldest(group), None, first - 1
        for number, block in enumerate(_ahead(self._blocks(place)), start=first):
            if len(block.row) < self.buffer:
                number -= 1
                break
            self._places[number] = block.place
            self._places.pop(number - 1 - self._mixing.reach, None)
            if number < oldest:
                continue
            rows = self.harvester.rows(block)
            if held is None:
                held = self._mixing.begin(rows, self._key, number)
                continue
            mixed, held = self._mixing.mix(held, rows, self._key, number)
            del rows
            if number > group:
                yield from self._cut(mixed, index)
                index = 0
            del mixed
        if self._mixing.gives_all and held is not None and number >= group:
            yield from self._cut(held, index)

    def _cut(self, rows: Any, index: int) -> Iterator[dict[str, Float[Array, "B D"]]]:
        """The batches of a group from number `index` on."""
        for i in range(index, self.buffer // self.batch):
            yield _slice(rows, i, self.batch)

    def _oldest(self, group: int) -> int:
        """The first block that a group takes part of."""
        return self._mixing.oldest(self._key, group, self.buffer)

    def place(self, t: int) -> Place | None:
        """Where the text of batch `t` begins; None: where all text begins.

        Known for the batches around the last one that was drawn.
        """
        group = t // (self.buffer // self.batch)
        first = self._oldest(group)
        if first not in self._places:
            raise ValueError(
                f"the place of batch {t} is not known; known are those of blocks "
                f"{sorted(self._places)} of {self.buffer // self.batch} batches"
            )
        return self._places[first]


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
