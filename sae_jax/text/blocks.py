"""Contexts grouped so that each group has exactly R used positions.

Which positions of a context are used depends on its tokens, so rows are counted: block
b is rows [b R, (b + 1) R) of all used positions in the text's order. A context on the
border of two blocks belongs to both, and the model reads it twice.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_jax.text.contexts import Context, Packing, contexts
from sae_jax.text.documents import Documents


class Place(NamedTuple):
    """A place in the text: a context's position, and how many of its rows are done."""

    context: Any
    done: int


class Block(NamedTuple):
    """Some contexts, and the rows to take from them.

    Row i is position `column[i]` of context `row[i]`. `real` is false at padding.
    `place` leads back to the block, `after` to the one that follows. A block shorter
    than R is the last one.
    """

    tokens: Int[np.ndarray, "N T"]
    real: Bool[np.ndarray, "N T"]
    row: Int[np.ndarray, " R"]
    column: Int[np.ndarray, " R"]
    place: Place | None
    after: Place


def blocks(
    documents: Documents,
    tokenizer: Any,
    packing: Packing,
    size: int,
    place: Place | None = None,
) -> Iterator[Block]:
    """Blocks of `size` rows, from the start or from a place."""
    start = place.context if place else None
    stream = contexts(documents, tokenizer, packing, start)
    done = place.done if place else 0
    held: list[Context] = []
    count = -done
    for context in stream:
        held.append(context)
        count += int(context.use.sum())
        while count >= size:
            block, done = _block(held, done, size, place)
            yield block
            held, count = held[-1:], count - size
            place = block.after
    if count > 0:
        yield _block(held, done, count, place)[0]


def _block(
    held: list[Context], done: int, size: int, place: Place | None
) -> tuple[Block, int]:
    """The next `size` rows, and how many rows of the last context are then used."""
    row, column = np.nonzero(np.stack([context.use for context in held]))
    row, column = row[done : done + size], column[done : done + size]
    in_last = int(held[-1].use[: column[-1] + 1].sum()) if len(row) else 0
    tokens = np.stack([context.tokens for context in held])
    real = np.stack([context.real for context in held])
    after = Place(held[-1].position, in_last)
    return Block(tokens, real, row, column, place, after), in_last
