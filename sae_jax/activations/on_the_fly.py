"""Batches from a language model that runs beside the SAE.

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
from jaxtyping import Array, Float

from sae_jax.activations.harvester import Harvester
from sae_jax.checks import changed
from sae_jax.text.blocks import Block, Place, blocks
from sae_jax.text.contexts import Packing
from sae_jax.text.documents import Documents


class OnTheFly:
    """A stream of batches `{site: [batch, width]}`.

    Args:
        harvester: The model and the sites.
        documents: The text.
        tokenizer: The model's tokenizer.
        packing: How documents become contexts.
        batch: Rows per batch.
        buffer: Rows per block; an even multiple of `batch`.
        seed: Decides the order of the rows.
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
        seed: int = 0,
    ):
        if buffer % (2 * batch) or buffer <= 0:
            raise ValueError(
                f"buffer={buffer} must be a multiple of twice the batch, {2 * batch}"
            )
        self.harvester, self.batch, self.buffer = harvester, batch, buffer
        self._blocks = partial(blocks, documents, tokenizer, packing, buffer)
        # What decides a batch, besides its number.
        self._made_by = {
            **harvester.made_by,
            "text": documents.fingerprint(),
            "packing": packing._asdict(),
            "batch": batch,
            "buffer": buffer,
            "seed": seed,
        }
        self._key = jax.random.key(seed)
        self._places: dict[int, Place | None] = {0: None}

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        return self.harvester.widths

    def batches(
        self, start: int = 0, position: Any = None
    ) -> Iterator[dict[str, Float[Array, "B D"]]]:
        """Batches from number `start` on.

        With the `position(start)` of an earlier run, the text before it is not read
        again; without, it is tokenised but not given to the model. Ends when the text
        ends, with what does not fill a block left over.
        """
        if start < 0:
            raise ValueError(f"start={start} must not be negative")
        group = start // (self.buffer // self.batch)
        first, place = 0, None
        if position is not None:
            differ = changed(position.get("made_by"), self._made_by)
            if differ:
                raise ValueError(
                    f"the position belongs to another stream: {differ}. (The text "
                    f"changes with its files, and 'embedded' with the Python)"
                )
            first, place = position["group"], position["place"]
            if first != group:
                raise ValueError(
                    f"position is that of group {first}, batch {start} is in {group}"
                )
            place = Place(*place) if place is not None else None
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

    def position(self, t: int) -> Any:
        """What `batches(t, position)` needs to begin at once; JSON can hold it.

        Known for the batches around the last one that was drawn.
        """
        group = t // (self.buffer // self.batch)
        if group not in self._places:
            raise ValueError(
                f"the place of batch {t} is not known; known are those of groups "
                f"{sorted(self._places)} of {self.buffer // self.batch} batches"
            )
        place = self._places[group]
        return {
            "made_by": self._made_by,
            "group": group,
            "place": list(place) if place is not None else None,
        }


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
