"""The largest of many numbers, without sorting them.

Two facts of `lax.top_k` (jax 0.10, CPU) shape the code: it is fast in float32 only,
other types take a full sort 75 times slower, so scores are cast to float32 first (exact
for bfloat16); and a static slice of its result that does not start at 0 (the k-th
value, say) turns it back into a full sort, so nothing slices it.

Where few are wanted, both functions first look at the maxima of blocks of 16: each of
the n largest numbers lies in one of the n blocks with the largest maxima. Ties go to
the lower index.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from sae_jax import mesh
from sae_jax.mesh import CODES, DATA, FEATURE, ROWS
from sae_jax.piecewise import by_columns

BLOCK = 16
COLUMNS = 128  # at a time; their numbers stay in the cache from pass to pass
WORD = 32  # bits


def wide(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scores in a type that is fast to compare; no gradient passes."""
    kind = jnp.promote_types(jnp.float32, scores.dtype)
    return jax.lax.stop_gradient(scores).astype(kind)


def per_row(
    scores: Float[Array, "B F"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`lax.top_k(scores, k)`; at k=32 and F=49,152 in two fifths of its time."""

    def part(scores: Array) -> tuple[Array, Array]:
        values, indices = of_part(scores, k)
        return merged(values, indices, k, scores.shape[1], FEATURE)

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
    """The k largest of each row, of scores that one device has, or all if fewer."""
    n_rows, n_features = scores.shape
    k = min(k, n_features)
    if n_features % BLOCK or k * BLOCK * 8 > n_features:
        values, indices = jax.lax.top_k(scores, k)
        return values, indices
    blocks = scores.reshape(n_rows, -1, BLOCK)
    _, found = jax.lax.top_k(blocks.max(2), k)
    found = jax.lax.sort(found, dimension=1)  # so that the lower index comes first
    indices = (found[:, :, None] * BLOCK + jnp.arange(BLOCK)).reshape(n_rows, -1)
    values, places = jax.lax.top_k(jnp.take_along_axis(scores, indices, axis=1), k)
    return values, jnp.take_along_axis(indices, places, axis=1)


def of_all(
    scores: Float[Array, "R C"], count: Array | float, *, count_max: int
) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Rows and columns of the `count` largest scores of all, in reading order.

    There are `count_max` slots; those from `count` on hold anything. At B=1024,
    F=12288 and 32,768 to be found this takes a seventh of the time of `lax.top_k`
    over all of them.
    """
    n_rows, n_columns = scores.shape
    bits = _ordered(wide(scores))
    if n_columns % BLOCK:  # filled up with what is below every score
        bits = jnp.pad(bits, ((0, 0), (0, -n_columns % BLOCK)))
    blocks = bits.reshape(n_rows, -1, BLOCK)
    n_blocks = blocks.shape[1]
    n_found = min(count_max, n_rows * n_blocks)
    wanted = jnp.minimum(count, n_found).astype(jnp.int32)
    found = _places(blocks.max(2), wanted, n_found, n_rows * n_blocks)
    row, block = found // n_blocks, found % n_blocks
    place = _places(blocks[row, block], count, count_max, wanted * BLOCK)
    which = place // BLOCK
    column = block[which] * BLOCK + place % BLOCK
    return row[which], jnp.minimum(column, n_columns - 1)


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
            return total(_set(_packed(bits >= v))) >= count

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


def mask_of_each(
    scores: Float[Array, "B F"], counts: Array, along: str
) -> Bool[Array, "B F"]:
    """The `counts` largest of each row, or of each column (along "data"), likewise."""
    axis = 0 if along == DATA else 1

    def least_of(bits: Array, counts: Array) -> Array:
        def enough(v: Array) -> Array:
            reached = _count(bits >= jnp.expand_dims(v, axis), axis)
            return mesh.total(reached, along) >= counts

        return _bisected(enough, bits.dtype, counts.shape)

    def part(scores: Array, counts: Array) -> Array:
        bits = _ordered(scores)
        at_once = COLUMNS if along == DATA and not mesh.inside(along) else bits.size
        least = jnp.expand_dims(by_columns(least_of, at_once, bits, counts), axis)
        above, level = bits > least, bits == least
        room = counts - mesh.total(_count(above, axis), along)
        n_level = _count(level, axis)
        room = room - mesh.before(n_level, along)

        def some(_: None) -> Array:
            rank = jnp.cumsum(level, axis=axis)
            return above | (level & (rank <= jnp.expand_dims(room, axis)))

        def all_or_none(_: None) -> Array:
            return above | (level & jnp.expand_dims(room > 0, axis))

        partly = (room > 0) & (room < n_level)
        return jax.lax.cond(partly.any(), some, all_or_none, None)

    of_counts = mesh.FEATURES if along == DATA else ROWS
    return mesh.on_each(part, (CODES, of_counts), CODES)(wide(scores), counts)


def _ordered(scores: Array) -> Array:
    """Unsigned integers above 0 in the order of scores of 4 or 8 bytes."""
    bits = {4: jnp.uint32, 8: jnp.uint64}[scores.dtype.itemsize]
    raw = jax.lax.bitcast_convert_type(scores, bits)
    sign = jnp.ones((), bits) << (8 * scores.dtype.itemsize - 1)
    return jnp.where(raw >= sign, ~raw, raw | sign)


def _places(
    bits: UInt[Array, "..."], count: Array | float, n: int, among: Array | float
) -> Int[Array, " n"]:
    """Where the `count` largest of the first `among` are, as ascending flat positions.

    What lies beyond is told apart by its position: to overwrite it would be a copy.
    """
    flat = bits.reshape(-1)
    counts = jnp.arange(flat.size) < among

    def enough(v: Array) -> Array:
        return _set(_packed((flat >= v) & counts)).sum() >= count

    least = _bisected(enough, bits.dtype)
    above, level = (_packed(f(flat, least) & counts) for f in (jnp.greater, jnp.equal))
    # All that are level with the last are equal, and taken in reading order: those of
    # whole words, and some of the word that comes next.
    room = count - _set(above).sum()
    until = jnp.cumsum(_set(level))
    whole = until <= room
    word = jnp.argmin(whole)
    some = level[word] >> jnp.arange(WORD, dtype=level.dtype) & 1
    left = room - (until - _set(level))[word]
    some = _packed((some == 1) & (jnp.cumsum(some) <= left))[0]
    taken = jnp.where(whole, level, 0).at[word].set(some)
    return _positions(above | taken, n, flat.size)


def _bisected(
    enough: Callable, dtype: jnp.dtype, shape: tuple[int, ...] = ()
) -> UInt[Array, "..."]:
    """The largest number v such that `enough(v)`, found bit by bit, or many of them."""
    n_bits = 8 * dtype.itemsize

    def halve(i: Array, found: Array) -> Array:
        trial = found | (jnp.ones((), dtype) << (n_bits - 1 - i).astype(dtype))
        return jnp.where(enough(trial), trial, found)

    return jax.lax.fori_loop(0, n_bits, halve, jnp.zeros(shape, dtype))


def _count(mask: Bool[Array, "R C"], axis: int) -> Int[Array, "..."]:
    """How many are true. A sum of floats is eight times as fast, and exact here."""
    return jnp.where(mask, 1.0, 0.0).sum(axis).astype(jnp.int32)


def _packed(mask: Bool[Array, "..."]) -> UInt[Array, " W"]:
    """Words of bits, the first the lowest. Counting them needs no array of numbers."""
    flat = mask.reshape(-1)
    words = jnp.pad(flat, (0, -flat.size % WORD)).reshape(-1, WORD).astype(jnp.uint32)
    return (words << jnp.arange(WORD, dtype=jnp.uint32)).sum(1, dtype=jnp.uint32)


def _set(words: UInt[Array, " W"]) -> Int[Array, " W"]:
    """How many bits are set in each word."""
    return jax.lax.population_count(words).astype(jnp.int32)


def compacted(mask: Bool[Array, " M"], n: int) -> Int[Array, " n"]:
    """The first n positions where the mask is true; anything once there are no more."""
    return _positions(_packed(mask), n, mask.size)


def _positions(words: UInt[Array, " W"], n: int, size: int) -> Int[Array, " n"]:
    """Of the first n set bits; anything below `size` once there are no more."""
    held = _set(words)
    word = jnp.repeat(jnp.arange(len(words)), held, total_repeat_length=n)
    rank = jnp.arange(n) - (jnp.cumsum(held) - held)[word]
    rest, lane = words[word], jnp.zeros(n, jnp.int32)
    half = WORD // 2
    while half:  # is it among the lower bits, or how many of the upper come before it?
        lower = rest & (2**half - 1)
        skip = rank >= _set(lower)
        rank = jnp.where(skip, rank - _set(lower), rank)
        rest = jnp.where(skip, rest >> half, lower)
        lane, half = jnp.where(skip, lane + half, lane), half // 2
    return jnp.minimum(word * WORD + lane, size - 1)
