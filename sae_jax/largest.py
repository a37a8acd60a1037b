"""The largest of many numbers, without sorting them.

Numbers become unsigned integers of the same order, of which the k-th largest is found
bit by bit: 32 times it is counted how many are at least as large as a trial. Where few
are wanted, the maxima of blocks of 16 come first: each of the n largest numbers lies in
one of the n blocks with the largest maxima. Ties go to the lower index, and what is
found comes in the order of its places.

Masks are packed into words, whose bits are counted by the processor: that needs no
array of numbers. `lax.top_k` of the same blocks (jax 0.10, on a CPU) takes at least 1.7
times as long for 32 of each row (B=1024, F=12,288), 2.5 times for 128, and sorts
everything in other types than float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from sae_jax import mesh, words
from sae_jax.mesh import CODES, DATA, FEATURE, ROWS
from sae_jax.piecewise import by_columns

BLOCK = 16
COLUMNS = 128  # at a time; their numbers stay in the cache from pass to pass


def wide(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scores in a type that is fast to compare; no gradient passes."""
    kind = jnp.promote_types(jnp.float32, scores.dtype)
    return jax.lax.stop_gradient(scores).astype(kind)


def per_row(
    scores: Float[Array, "B F"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Values and places of the k largest of each row."""

    def part(scores: Array) -> tuple[Array, Array]:
        return merged(*of_part(scores, k), k, scores.shape[1], FEATURE)

    return mesh.on_each(part, CODES, (ROWS, ROWS))(wide(scores))


def merged(
    values: Float[Array, "B n"],
    indices: Int[Array, "B n"],
    k: int,
    size: int,
    axis: str,
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The k largest of what the devices of an axis found, each in its own `size`."""
    if mesh.size(axis) == 1:
        return values, indices
    indices = indices + size * jax.lax.axis_index(axis)
    values = mesh.together(values, axis, dimension=1)
    indices = mesh.together(indices, axis, dimension=1)
    values, places = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(indices, places, axis=1)


def of_part(
    scores: Float[Array, "B F"], k: int
) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The same of scores that one device has, or all if they are fewer."""
    k = min(k, scores.shape[1])
    block, lane = _blocks(_in_blocks(scores), k, k)
    indices = block * BLOCK + lane
    return jnp.take_along_axis(scores, indices, axis=1), indices


def of_all(
    scores: Float[Array, "R C"], count: Array | float, *, count_max: int
) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Rows and columns of the `count` largest scores of all, in reading order.

    There are `count_max` slots; those from `count` on hold anything. At B=1024,
    F=12288 and 32,768 to be found this takes a ninth of the time of `lax.top_k` over
    all of them.
    """
    bits = _in_blocks(wide(scores))
    count = jnp.minimum(count, count_max)
    (block,), (lane,) = _blocks(bits.reshape(1, -1, BLOCK), count, count_max)
    row, block = jnp.divmod(block, bits.shape[1])
    return row, jnp.minimum(block * BLOCK + lane, scores.shape[1] - 1)


def mask_of_all(
    scores: Float[Array, "B F"], count: Array | float
) -> Bool[Array, "B F"]:
    """Which are the `count` largest scores of all; on a mesh all stay where they are.

    Devices tell each other how many lie above a trial, and how many are level with the
    last, row by row: that settles ties as in `of_all`.
    """

    def part(scores: Array, count: Array) -> Array:
        def total(per_row: Array) -> Array:
            return mesh.total(per_row.sum(), DATA, FEATURE)

        bits = _ordered(scores)

        def enough(v: Array) -> Array:
            return total(words.count(bits >= v)) >= count

        least = _bisected(enough, bits.dtype)
        above, level = bits > least, bits == least
        room = count - total(above.sum(1))
        each = level.sum(1)
        rows = mesh.total(each, FEATURE)
        earlier = jnp.cumsum(rows) - rows + mesh.before(rows.sum(), DATA)
        earlier = earlier + mesh.before(each, FEATURE)
        return above | (level & (earlier[:, None] + jnp.cumsum(level, axis=1) <= room))

    found = mesh.on_each(part, (CODES, mesh.WHOLE), CODES)
    return found(wide(scores), jnp.asarray(count))


def mask_of_rows(scores: Float[Array, "B F"], counts: Array) -> Bool[Array, "B F"]:
    """The `counts` largest of each row, likewise."""
    find = mesh.on_each(mask_of_found, (CODES, ROWS), CODES)
    return find(wide(scores), counts)


def mask_of_found(scores: Float[Array, "B k"], counts: Array) -> Bool[Array, "B k"]:
    """The same of what was found for each row, which is not spread by features."""
    taken = _taken(_ordered(scores), counts, across=FEATURE)
    return words.unpacked(taken, scores.shape[1])


def mask_of_columns(scores: Float[Array, "B F"], counts: Array) -> Bool[Array, "B F"]:
    """The `counts` largest of each column, likewise."""

    def least_of(bits: Array, counts: Array) -> Array:
        def enough(v: Array) -> Array:
            return mesh.total(_count(bits >= v), DATA) >= counts

        return _bisected(enough, bits.dtype, counts.shape)

    def part(scores: Array, counts: Array) -> Array:
        bits = _ordered(scores)
        at_once = bits.size if mesh.inside(DATA) else COLUMNS
        least = by_columns(least_of, at_once, bits, counts)
        above, level = bits > least, bits == least
        room = counts - mesh.total(_count(above), DATA)
        n_level = _count(level)
        room = room - mesh.before(n_level, DATA)

        def some(_: None) -> Array:
            return above | (level & (jnp.cumsum(level, axis=0) <= room))

        def all_or_none(_: None) -> Array:
            return above | (level & (room > 0))

        partly = (room > 0) & (room < n_level)
        return jax.lax.cond(partly.any(), some, all_or_none, None)

    return mesh.on_each(part, (CODES, mesh.FEATURES), CODES)(wide(scores), counts)


def _ordered(scores: Array) -> Array:
    """Unsigned integers above 0 in the order of scores of 4 or 8 bytes."""
    bits = {4: jnp.uint32, 8: jnp.uint64}[scores.dtype.itemsize]
    raw = jax.lax.bitcast_convert_type(scores, bits)
    sign = jnp.ones((), bits) << (8 * scores.dtype.itemsize - 1)
    return jnp.where(raw >= sign, ~raw, raw | sign)


def _in_blocks(scores: Float[Array, "R C"]) -> UInt[Array, "R N 16"]:
    """Integers of the same order, filled up with what is below every score."""
    bits = _ordered(scores)
    if bits.shape[1] % BLOCK:
        bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % BLOCK)))
    return bits.reshape(len(bits), -1, BLOCK)


def _blocks(
    blocks: UInt[Array, "R N 16"], count: Array | int, k: int
) -> tuple[Int[Array, "R k"], Int[Array, "R k"]]:
    """The block of each of the `count` largest of a row, and its place in there.

    There are k slots; those from `count` on hold anything.
    """
    n_rows, n_blocks, _ = blocks.shape
    if k >= n_blocks:
        place = _places(blocks.reshape(n_rows, -1), count, k, n_blocks * BLOCK)
        return place // BLOCK, place % BLOCK
    found = _places(blocks.max(2), count, k, n_blocks + 1)
    # One block more, in which nothing is, for slots that stay empty.
    held = jnp.pad(blocks, ((0, 0), (0, 1), (0, 0)))
    held = held[jnp.arange(n_rows)[:, None], found]
    place = _places(held.reshape(n_rows, -1), count, k, k * BLOCK)
    block = jnp.take_along_axis(found, place // BLOCK, axis=1)
    return jnp.minimum(block, n_blocks - 1), place % BLOCK


def _places(
    bits: UInt[Array, "R C"], count: Array | float, n: int, size: int
) -> Int[Array, "R n"]:
    """Where the `count` largest of each row are, ascending, and then `size - 1`."""
    counts = jnp.broadcast_to(count, len(bits))
    return words.positions(_taken(bits, counts), n, size)


def _taken(
    bits: UInt[Array, "R C"], counts: Array, *, across: str | None = None
) -> UInt[Array, "R W"]:
    """Which are the `counts` largest of each row, in words.

    Or of what all devices of an axis have of the row.
    """
    n_rows, _ = bits.shape

    def total(found: Array) -> Array:
        return found if across is None else mesh.total(found, across)

    def enough(v: Array) -> Array:
        return total(words.count(bits >= v[:, None])) >= counts

    least = _bisected(enough, bits.dtype, (n_rows,))[:, None]
    above, level = words.packed(bits > least), words.packed(bits == least)
    # All that are level with the last are equal, and taken in their order: those of
    # whole words, and some of the word that comes next.
    room = counts - total(words.n_set(above).sum(1))
    held = words.n_set(level)
    if across is not None:
        room = room - mesh.before(held.sum(1), across)
    until = jnp.cumsum(held, axis=1)
    whole = until <= room[:, None]
    word = jnp.minimum(whole.sum(1), level.shape[1] - 1)
    at = jnp.arange(n_rows), word
    left = room - (until - held)[at]
    bit = words.unpacked(level[at][:, None], words.WORD)
    some = words.packed(bit & (jnp.cumsum(bit, axis=1) <= left[:, None]))
    return above | jnp.where(whole, level, 0).at[at].set(some[:, 0])


def _bisected(
    enough: Callable, dtype: jnp.dtype, shape: tuple[int, ...] = ()
) -> UInt[Array, "..."]:
    """The largest number v such that `enough(v)`, found bit by bit, or many of them."""
    n_bits = 8 * dtype.itemsize

    def halve(i: Array, found: Array) -> Array:
        trial = found | (jnp.ones((), dtype) << (n_bits - 1 - i).astype(dtype))
        return jnp.where(enough(trial), trial, found)

    return jax.lax.fori_loop(0, n_bits, halve, jnp.zeros(shape, dtype))


def _count(mask: Bool[Array, "R C"]) -> Int[Array, " C"]:
    """How many are true. A sum of floats is eight times as fast, and exact here."""
    return jnp.where(mask, 1.0, 0.0).sum(0).astype(jnp.int32)


def compacted(mask: Bool[Array, " M"], n: int) -> Int[Array, " n"]:
    """The first n positions where the mask is true; anything once there are no more."""
    return words.positions(words.packed(mask[None]), n, mask.size)[0]
