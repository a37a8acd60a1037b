"""Coherence: how far the directions of a dictionary are from orthogonal.

A dictionary is eps-quasi-orthogonal if |cos(d_i, d_j)| <= eps for all i != j; the
least such eps is the `maximum` here. The theorem of Lee et al. 2025 (arXiv:2503.24277;
`quasi_orthogonality`) speaks of this eps. No F > D directions can have less than the
Welch bound, and random ones have about sqrt(4 ln F / D).

Differs: the authors log maximum and mean of the signed cosines, where a -0.9 does not
show; here they are absolute. Theirs fills a matrix [F, F]; here nothing is larger than
the dictionary and one tile of `block` by `block` cosines.

Rows of zeros have no direction: they are left out, and counted.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae_jax import checks

QUANTILES = (0.5, 0.9, 0.99, 0.999)
BINS = 2**16
BLOCK = 2048  # 512 to 4096 were tried on 2 CPU cores; a tile takes 16 MiB
_CHUNK = 8192  # pairs that `sampled` gathers at a time


class Coherence(NamedTuple):
    """Statistics of |cos| over pairs of different rows.

    Attributes:
      maximum: the largest: the dictionary's eps, if all pairs were read.
      mean: the mean.
      quantiles: the least value that a share q of the pairs does not pass, for each q.
      standard_error: of the mean, from sampling; 0 where all pairs were read.
      bin_error: how far off quantiles can be because they were read off a histogram,
        half a bin; 0 where they were not.
      n_pairs: how many pairs were read.
      n_zero: how many rows are zero and have no part in this.
    """

    maximum: float
    mean: float
    quantiles: dict[float, float]
    standard_error: float
    bin_error: float
    n_pairs: int
    n_zero: int


class Neighbours(NamedTuple):
    """The nearest features of each, nearest first."""

    indices: Int[np.ndarray, "F N"]
    cosines: Float[np.ndarray, "F N"]


def exact(
    W_dec: Float[Array | np.ndarray, "F D"],
    *,
    quantiles: Sequence[float] = QUANTILES,
    block: int = BLOCK,
) -> Coherence:
    """Reads all F (F - 1) / 2 pairs, in tiles of the upper triangle.

    Maximum and mean are those of the values, quantiles those of a histogram of 2^16
    bins. Counting on the host is fastest: `np.bincount` takes 1 to 3 ns a pair on a CPU
    core, a scatter by XLA 5, `np.histogram` 7, sorting 34 or more. The cosines
    themselves, 15 to 20 ns at D = 768 on two cores, are the most of it.
    """
    unit, kept = _directions(W_dec, quantiles)
    n = len(kept)
    block, unit = _in_blocks(unit, block)
    n_pairs = n * (n - 1) // 2
    counts, total, maximum = np.zeros(BINS, np.int64), 0.0, 0.0
    for top in range(0, n, block):
        for left in range(top, n, block):
            bins, sums, largest = _tile(unit, top, left, block=block)
            counts += np.bincount(np.asarray(bins).reshape(-1), minlength=BINS)
            total += float(np.asarray(sums).sum(dtype=np.float64))
            maximum = max(maximum, float(largest))
    # The diagonal, what lies below it and the padding came in as zeros.
    counts[0] -= counts.sum() - n_pairs
    reached = np.cumsum(counts)
    found = {}
    for q in quantiles:
        at = np.searchsorted(reached, max(1, math.ceil(q * n_pairs)))
        found[q] = min((int(at) + 0.5) / BINS, maximum)
    n_zero = len(W_dec) - n
    return Coherence(maximum, total / n_pairs, found, 0.0, 0.5 / BINS, n_pairs, n_zero)


def sampled(
    W_dec: Float[Array | np.ndarray, "F D"],
    *,
    n_pairs: int,
    seed: int,
    quantiles: Sequence[float] = QUANTILES,
) -> Coherence:
    """Reads `n_pairs` pairs drawn at random, with replacement.

    Quantiles are those of the sample's values. Its maximum is only a lower bound of the
    dictionary's: two features out of many that point the same way are rarely drawn.
    """
    if n_pairs < 2:
        raise ValueError(f"n_pairs={n_pairs}; at least 2 are needed for an error.")
    unit, kept = _directions(W_dec, quantiles)
    n, rows = len(kept), np.asarray(unit)
    rng = np.random.default_rng(seed)
    first = rng.integers(n, size=n_pairs)
    second = (first + rng.integers(1, n, size=n_pairs)) % n  # any row but the first
    sizes = np.empty(n_pairs)
    for start in range(0, n_pairs, _CHUNK):
        here = slice(start, start + _CHUNK)
        cos = np.einsum("nd,nd->n", rows[first[here]], rows[second[here]])
        sizes[here] = np.abs(cos)
    sizes = np.minimum(sizes, 1)
    values = np.quantile(sizes, quantiles, method="inverted_cdf")
    return Coherence(
        float(sizes.max()),
        float(sizes.mean()),
        dict(zip(quantiles, values.tolist(), strict=True)),
        float(sizes.std(ddof=1) / math.sqrt(n_pairs)),
        0.0,
        n_pairs,
        len(W_dec) - n,
    )


def nearest(
    W_dec: Float[Array | np.ndarray, "F D"], *, n: int, block: int = BLOCK
) -> Neighbours:
    """The `n` other features with the largest |cos|, and their signed cosines.

    A cosine near 1 is a duplicate, one near -1 an opposite. A row of zeros is nobody's
    neighbour. Where there are no more others, the index is -1 and the cosine NaN.
    """
    if n < 1:
        raise ValueError(f"n={n}; ask for one neighbour at least.")
    indices = np.full((len(W_dec), n), -1)
    cosines = np.full((len(W_dec), n), np.nan)
    checks.rows("W_dec", W_dec, W_dec.shape[-1])
    unit, kept = unit_rows(W_dec)
    n = min(n, len(kept) - 1)
    if n < 1:
        return Neighbours(indices, cosines)
    block, unit = _in_blocks(unit, block)
    for top in range(0, len(kept), block):
        found = jnp.full((block, n), -1), jnp.zeros((block, n), unit.dtype)
        for left in range(0, len(kept), block):
            found = _nearer(unit, top, left, *found, block=block)
        rows = kept[top : top + block]
        indices[rows, :n] = kept[np.asarray(found[0])[: len(rows)]]
        cosines[rows, :n] = np.asarray(found[1])[: len(rows)]
    return Neighbours(indices, cosines)


def welch_bound(n_features: int, width: int) -> float:
    """No F directions in D dimensions have a smaller maximum than this.

    `sqrt((F - D) / (D (F - 1)))` for F > D (Welch 1974), otherwise 0.
    """
    if n_features <= width:
        return 0.0
    return math.sqrt((n_features - width) / (width * (n_features - 1)))


def random_maximum(n_features: int, width: int) -> float:
    """About the maximum of F random directions: `sqrt(4 ln F / D)`, for D >> ln F."""
    return math.sqrt(4 * math.log(n_features) / width)


def unit_rows(
    W_dec: Float[Array | np.ndarray, "F D"],
) -> tuple[Float[Array, "N D"], Int[np.ndarray, " N"]]:
    """The rows that are not zero, at norm 1, and which they are."""
    rows = jnp.asarray(W_dec)
    rows = rows.astype(jnp.promote_types(jnp.float32, rows.dtype))
    peak = jnp.abs(rows).max(axis=1, keepdims=True)
    kept = np.flatnonzero(np.asarray(peak)[:, 0])
    if len(kept) < len(rows):
        rows, peak = rows[kept], peak[kept]
    rows = rows / peak  # the squares of very short rows would be 0
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True), kept


def cosines(a: Float[Array, "N D"], b: Float[Array, "M D"]) -> Float[Array, "N M"]:
    """All cosines of two sets of unit rows; accelerators multiply in full float32."""
    return jnp.clip(jnp.matmul(a, b.T, precision="highest"), -1, 1)


def pad_rows(rows: Float[Array, "N D"], block: int) -> Float[Array, "M D"]:
    """The same rows and as many zeros as fill the last block."""
    missing = -len(rows) % block
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _directions(
    W_dec: Float[Array | np.ndarray, "F D"], quantiles: Sequence[float] = ()
) -> tuple[Float[Array, "N D"], Int[np.ndarray, " N"]]:
    """`unit_rows` of what was checked."""
    wrong = [q for q in quantiles if not 0 <= q <= 1]
    if wrong:
        raise ValueError(f"quantiles={wrong}; give shares between 0 and 1.")
    checks.rows("W_dec", W_dec, W_dec.shape[-1])
    unit, kept = unit_rows(W_dec)
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {len(W_dec)} rows of W_dec are not zero; a pair needs two."
        )
    return unit, kept


def _in_blocks(
    unit: Float[Array, "N D"], block: int
) -> tuple[int, Float[Array, "M D"]]:
    if block < 1:
        raise ValueError(f"block={block}; tiles have at least one row.")
    block = min(block, len(unit))
    return block, pad_rows(unit, block)


@partial(jax.jit, static_argnames="block")
def _tile(unit, top, left, *, block):
    """|cos| of the pairs i < j of one tile: their bins, sum per row, maximum."""
    i, j, cos = _cosines_at(unit, top, left, block)
    size = jnp.where(i < j, jnp.abs(cos), 0)
    bins = jnp.minimum(size * BINS, BINS - 1).astype(jnp.int32)
    return bins, size.sum(1), size.max()


@partial(jax.jit, static_argnames="block")
def _nearer(unit, top, left, indices, best, *, block):
    """The nearest of those found so far and those of one more tile."""
    i, j, cos = _cosines_at(unit, top, left, block)
    n = best.shape[1]
    cos = jnp.concatenate([best, cos], axis=1)
    known = jnp.concatenate([indices, jnp.broadcast_to(j, (block, block))], axis=1)
    # Padding has cosine 0 and, of equal ones, comes last: it is never among the n.
    counts = (known >= 0) & (known != i)
    _, at = jax.lax.top_k(jnp.where(counts, jnp.abs(cos), -1), n)
    return jnp.take_along_axis(known, at, 1), jnp.take_along_axis(cos, at, 1)


def _cosines_at(unit, top, left, block):
    """Row numbers, column numbers and cosines of one tile."""
    a, b = (jax.lax.dynamic_slice_in_dim(unit, at, block) for at in (top, left))
    steps = jnp.arange(block)
    return top + steps[:, None], left + steps[None], cosines(a, b)
