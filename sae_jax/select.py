"""Selection: which features stay on. The rules decide by what score; this decides how.

Every function takes scores `[B, F]` and answers with a `Selection`: a boolean mask
`[B, F]`, or, where the number selected is small, `Rows` of indices or `Entries` of the
whole batch. The count may be a traced value (schedules, ensembles) below a static
ceiling. Ties go to the lower index. No gradient goes through a selection, and nothing
here sorts F values per row.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sae_jax import codes, crossing, largest, mesh, products, words
from sae_jax.mesh import CODES, FEATURE, FEATURES, ROWS, WHOLE
from sae_jax.piecewise import by_rows

# Sparse codes beat dense ones while K/F is below this: at B=4096, D=768, F=12288
# on two CPU cores one slot costs 4.3 ms and the dense products as much as 400 slots.
SPARSE_BELOW = 1 / 32

# Rows at a time. On a CPU fewer than all stay in the cache between two passes.
ROWS_ENCODED = 256
ROWS_CUT = 32


class Rows(NamedTuple):
    """Up to K features for each row; those with `keep` false are not selected.

    `picked` are the pre-activations there, where the selection has seen them.
    """

    indices: Int[Array, "B K"]
    keep: Bool[Array, "B K"]
    picked: Float[Array, "B K"] | None = None


class Entries(NamedTuple):
    """Up to N entries of the batch, row by row, any number of them in one row."""

    rows: Int[Array, " N"]
    features: Int[Array, " N"]
    keep: Bool[Array, " N"]


Selection: TypeAlias = Bool[Array, "B F"] | Rows | Entries
Cut: TypeAlias = Literal["nearest", "exceed"]


def keep(
    encoder: products.Encoder, chosen: Selection, *, signed: bool = False
) -> codes.Codes:
    """Codes `relu(pre)`, or `pre` where `signed`, on the chosen features.

    They are sparse where the choice is sparse.
    """
    value = (lambda pre: pre) if signed else jax.nn.relu
    n_rows, n_features = encoder.x.shape[0], encoder.W_enc.shape[0]
    if isinstance(chosen, Rows):
        picked = chosen.picked
        if picked is None:
            picked = _read(encoder.pre, chosen.indices)
        places = codes.Sparse(picked, chosen.indices, n_features)
        picked = _at(encoder, codes.as_pairs(places)).reshape(picked.shape)
        values = jnp.where(chosen.keep, value(picked), 0)
        return codes.Sparse(values, chosen.indices, n_features)
    if isinstance(chosen, Entries):
        where = chosen.rows, chosen.features
        pairs = codes.Pairs(encoder.pre[where], *where, n_rows, n_features)
        values = jnp.where(chosen.keep, value(_at(encoder, pairs)), 0)
        return dataclasses.replace(pairs, values=values)
    return jnp.where(chosen, value(encoder.pre), 0)


def _at(encoder: products.Encoder, pairs: codes.Pairs) -> Float[Array, " N"]:
    """The values of pairs that were read from `pre`, with their gradients."""
    return products.preactivations_at(
        encoder.x,
        encoder.W_enc,
        encoder.b_enc,
        encoder.b_pre,
        pairs.rows,
        pairs.features,
        jax.lax.stop_gradient(pairs.values),
        encoder.dtype,
    )


def rows(
    scores: Float[Array, "B F"] | products.Encoder,
    count: Array | float,
    *,
    count_max: int,
) -> Selection:
    """The `count` largest scores of each row.

    Given the encoder instead of scores, it takes the pre-activations, and where the
    result is sparse computes them for some rows at a time: the whole `[B, F]` never
    exists, which saves a fifth of encoding and selecting together.
    """
    given = scores.pre if isinstance(scores, products.Encoder) else scores
    n_features = given.shape[1]
    count_max = min(count_max, n_features)
    sparse = count_max < SPARSE_BELOW * n_features
    counts = jnp.broadcast_to(jnp.minimum(count, count_max), given.shape[0])
    if not sparse:
        return largest.mask_of_rows(given, counts)
    if isinstance(scores, products.Encoder):
        values, indices = _of_encoder(scores, count_max)
        picked = values
    else:
        values, indices = largest.per_row(given, count_max)
        picked = None
    if isinstance(count, int | float) and count >= count_max:
        kept = jnp.ones(indices.shape, bool)
    else:
        kept = largest.mask_of_found(values, counts)
    return Rows(indices, kept, picked)


def _of_encoder(encoder: products.Encoder, k: int) -> tuple[Array, Array]:
    """Values and places of the k largest pre-activations of each row."""

    def part(x: Array, *rest: Array) -> tuple[Array, Array]:
        def some(x: Array) -> tuple[Array, Array]:
            pre = largest.wide(products.preactivations(x, *rest, encoder.dtype))
            # Else the maxima of blocks are fused with the product, which slows it down.
            return largest.of_part(jax.lax.optimization_barrier(pre), k)

        values, indices = by_rows(some, ROWS_ENCODED, x)
        return largest.merged(values, indices, k, rest[0].shape[0], FEATURE)

    factors = encoder.x, encoder.W_enc, encoder.b_enc, encoder.b_pre
    spread = ROWS, FEATURES, FEATURES, WHOLE
    found = mesh.on_each(part, spread, (ROWS, ROWS))
    return found(*jax.lax.stop_gradient(factors))


def _read(scores: Float[Array, "B F"], indices: Int[Array, "B K"]) -> Array:
    """The scores at indices of each row."""

    def part(scores: Array, indices: Array) -> Array:
        indices, mine = mesh.own(indices, scores.shape[1], FEATURE)
        found = jnp.take_along_axis(scores, indices, axis=1)
        return mesh.total(jnp.where(mine, found, 0), FEATURE)

    read = mesh.on_each(part, (CODES, ROWS), ROWS)
    return read(jax.lax.stop_gradient(scores), indices)


def batch(
    scores: Float[Array, "B F"], count: Array | float, *, count_max: int
) -> Bool[Array, "B F"] | Entries:
    """The `count` largest scores of the whole batch."""
    if mesh.spread():
        return largest.mask_of_all(scores, count)
    count_max = min(count_max, scores.size)
    rows, features = largest.of_all(scores, count, count_max=count_max)
    kept = jnp.arange(count_max) < count
    if count_max < SPARSE_BELOW * scores.size:
        return Entries(rows, features, kept)
    return jnp.zeros(scores.shape, bool).at[rows, features].max(kept)


def columns(
    scores: Float[Array, "B F"], counts: Array | float, *, count_max: int
) -> Bool[Array, "B F"] | Entries:
    """The `counts` largest scores of each column, `count_max` at most in all.

    One whole number for all, or `[F]`. Places are counted in int32, or not listed.
    """
    n_rows, n_features = scores.shape
    counts = jnp.minimum(jnp.broadcast_to(counts, n_features), n_rows)
    mask = largest.mask_of_columns(scores, counts)
    count_max = min(count_max, scores.size)
    sparse = count_max < SPARSE_BELOW * scores.size and scores.size < 2**31
    if mesh.spread() or not sparse:
        return mask
    places = largest.compacted(mask.reshape(-1), count_max)
    return Entries(*divmod(places, n_features), jnp.arange(count_max) < counts.sum())


def norm_cut(
    scores: Float[Array, "B F"],
    target: Float[Array, " B"],
    *,
    lengths: Float[Array, " F"] | None = None,
    how: Cut = "nearest",
) -> Bool[Array, "B F"]:
    """Keeps the largest strengths until their Euclidean norm meets the target.

    A strength is a positive score, times the length of its feature where `lengths` are
    given. With c_m the norm of the m largest strengths and m in 1..F, `nearest` takes
    the first m that minimises |c_m - target| and `exceed` the first m with
    c_m >= target. As in the Top-AFA authors' code, keeping all F features never counts
    as nearest; they write c_F = 1e4, here it is infinite.

    Instead of sorting, the cut is found by bisection on the bits of the squared
    strengths, which order non-negative floats: 30 masked sums in float32. Rows are
    scaled by a power of two first, so that no square overflows. A norm within rounding
    of the target meets it, and entries lost in rounding do not count: else a code that
    is exact draws in every feature of strength 1e-5 (L0 5.4 instead of 3.3, measured).
    """
    if lengths is None:
        lengths = jnp.ones(scores.shape[1:], scores.dtype)

    def part(scores: Array, target: Array, lengths: Array) -> Array:
        cut = partial(_norm_cut, lengths=lengths, how=how)
        at_once = scores.shape[0] if mesh.inside(FEATURE) else ROWS_CUT
        return by_rows(cut, at_once, scores, target)

    cut = mesh.on_each(part, (CODES, ROWS, FEATURES), CODES)
    return cut(*map(largest.wide, (scores, target, lengths)))


def _norm_cut(scores: Array, target: Array, *, lengths: Array, how: Cut) -> Array:
    """`norm_cut` of rows that fit into the cache."""
    strengths = jnp.maximum(scores, 0) * lengths
    highest = mesh.most(strengths.max(1), FEATURE)
    exponent = jnp.frexp(jnp.maximum(highest, target))[1]
    one = jnp.ones((), target.dtype)
    half = exponent // 2  # 2 ** -exponent itself may be too small to be written
    scales = jnp.ldexp(one, -half), jnp.ldexp(one, half - exponent)
    squares = jnp.square(strengths * scales[0][:, None] * scales[1][:, None])
    target = target * scales[0] * scales[1] * (1 - 2 * jnp.finfo(target.dtype).eps)

    cut = crossing.of_squares(squares, target)
    above = squares > cut[:, None]
    level = squares == cut[:, None]
    before = mesh.total(jnp.where(above, squares, 0).sum(1), FEATURE)
    here = words.count(level)
    n_level = mesh.total(here, FEATURE)

    def length(taken: Array) -> Array:
        return jnp.sqrt(before + taken * cut)

    # Of the entries equal to the cut, take the fewest whose norm meets the target...
    needed = jnp.ceil((jnp.square(target) - before) / jnp.where(cut > 0, cut, 1))
    needed = jnp.clip(needed, 1, n_level).astype(n_level.dtype)
    needed = jnp.where(length(needed) < target, needed + 1, needed)  # ceil rounds
    needed = jnp.where(length(needed - 1) >= target, needed - 1, needed)
    taken = jnp.clip(needed, 1, n_level)
    if how == "exceed":
        short = length(taken) < target
        return above | _first(level, taken, here) | short[:, None]
    # ...or one less, if that is as near.
    under, over = target - length(taken - 1), length(taken) - target
    taken = jnp.where((over >= 0) & (under <= over), taken - 1, taken)
    lowest = mesh.least(squares.min(1), FEATURE)
    all_of_them = (lowest >= cut) & (taken == n_level)
    taken = jnp.where(all_of_them, taken - 1, taken)
    taken = jnp.where(before > 0, taken, jnp.maximum(taken, 1))  # m is at least 1
    return above | _first(level, taken, here)


def _first(mask: Array, count: Array, there: Array) -> Array:
    """The first `count` true entries of each row of a mask that has `there` of them."""
    count = count - mesh.before(there, FEATURE)
    partly = (count > 0) & (count < there)

    def some(_: None) -> Array:
        return mask & (jnp.cumsum(mask, axis=1) <= count[:, None])

    def all_or_none(_: None) -> Array:
        return mask & (count > 0)[:, None]

    return jax.lax.cond(partly.any(), some, all_or_none, None)
