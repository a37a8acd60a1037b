"""Masks packed into words of bits, which are counted without an array of numbers.

Where few bits are set their positions come from counts of words and a search in one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

WORD = 32  # bits
VECTOR = 16  # words that a core takes at once


def packed(mask: Bool[Array, "R C"]) -> UInt[Array, "R W"]:
    """Words of bits, the first the lowest."""
    n_rows, size = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, -size % WORD))).reshape(n_rows, -1, WORD)
    words = mask.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)
    return words.sum(2, dtype=jnp.uint32)


def count(mask: Bool[Array, "R C"]) -> Int[Array, " R"]:
    """How many are true in each row.

    The bits of a word lie apart here, so that neighbours go into neighbouring words:
    side by side, that takes half the time of `packed` (which keeps the order). What
    does not fill whole vectors of words comes after, since padding takes ten times as
    long.
    """
    n_rows, rest = mask.shape
    total = jnp.zeros(n_rows, jnp.int32)
    while rest >= VECTOR:
        across = max(rest // WORD // VECTOR, 1) * VECTOR
        deep = min(rest // across, WORD)
        part, mask = jnp.split(mask, [across * deep], axis=1)
        lanes = part.reshape(n_rows, deep, across).astype(jnp.uint32)
        words = lanes << jnp.arange(deep, dtype=jnp.uint32)[:, None]
        total += n_set(words.sum(1, dtype=jnp.uint32)).sum(1)
        rest = mask.shape[1]
    return total + mask.sum(1, dtype=jnp.int32)


def unpacked(words: UInt[Array, "R W"], size: int) -> Bool[Array, "R {size}"]:
    """The mask that was packed."""
    bits = words[:, :, None] >> jnp.arange(WORD, dtype=words.dtype) & 1
    return bits.reshape(len(words), -1)[:, :size] == 1


def n_set(words: UInt[Array, "R W"]) -> Int[Array, "R W"]:
    """How many bits are set in each word."""
    return jax.lax.population_count(words).astype(jnp.int32)


def positions(words: UInt[Array, "R W"], n: int, size: int) -> Int[Array, "R n"]:
    """Of the first n set bits of each row, and then `size - 1`."""
    n_rows, n_words = words.shape
    held = n_set(words)
    until = jnp.minimum(jnp.cumsum(held, axis=1), n)
    start = jnp.pad(until, ((0, 0), (1, 0)))
    # One more word for slots that stay empty: so each row fills n of them.
    each = jnp.diff(start, axis=1, append=n).reshape(-1)
    every = jnp.arange(n_rows * (n_words + 1))
    word = jnp.repeat(every, each, total_repeat_length=n_rows * n)
    word = word.reshape(n_rows, n) - (n_words + 1) * jnp.arange(n_rows)[:, None]
    rank = jnp.arange(n) - jnp.take_along_axis(start, word, axis=1)
    rest = jnp.take_along_axis(words, jnp.minimum(word, n_words - 1), axis=1)
    lane, half = jnp.zeros_like(word), WORD // 2
    while half:  # is it among the lower bits, or how many of the upper come before it?
        lower = rest & (2**half - 1)
        skip = rank >= n_set(lower)
        rank = jnp.where(skip, rank - n_set(lower), rank)
        rest = jnp.where(skip, rest >> half, lower)
        lane, half = jnp.where(skip, lane + half, lane), half // 2
    return jnp.minimum(word * WORD + lane, size - 1)
