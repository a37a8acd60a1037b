"""Codes: which features are active in each row, and how strongly.

Codes are dense, an array `[B, F]`; or sparse, a `Sparse` of `[B, K]` values and
feature indices; or `Pairs`, a list for the whole batch, where rows share a budget.
Everything downstream takes all three, through the functions below and `products`.
"""

import dataclasses
from typing import Any, TypeAlias

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Sparse:
    """At most K active features per row.

    `indices` are unique within a row; an unused slot has value 0 and any index.
    """

    values: Array  # [B K]
    indices: Array  # [B K]
    n_features: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Pairs:
    """The active features of a batch, as many in one row as there are.

    Pairs are unique and sorted by row; an unused one has value 0 and any place.
    """

    values: Array  # [N]
    rows: Array  # [N]
    features: Array  # [N]
    n_rows: int = flax.struct.field(pytree_node=False)
    n_features: int = flax.struct.field(pytree_node=False)


Codes: TypeAlias = Float[Array, "B F"] | Sparse | Pairs


def as_pairs(codes: Sparse | Pairs) -> Pairs:
    """Sparse codes as one list."""
    if isinstance(codes, Pairs):
        return codes
    n_rows, k = codes.indices.shape
    rows = jnp.repeat(jnp.arange(n_rows), k)
    values, features = codes.values.reshape(-1), codes.indices.reshape(-1)
    return Pairs(values, rows, features, n_rows, codes.n_features)


def to_dense(codes: Codes) -> Float[Array, "B F"]:
    """The codes as one array, whatever their form."""
    if not isinstance(codes, Sparse | Pairs):
        return codes
    codes = as_pairs(codes)
    zeros = jnp.zeros((codes.n_rows, codes.n_features), codes.values.dtype)
    return zeros.at[codes.rows, codes.features].add(codes.values)


def entries(codes: Codes) -> Float[Array, "..."]:
    """All values that may be non-zero, in no particular order."""
    return codes.values if isinstance(codes, Sparse | Pairs) else codes


def with_entries(codes: Codes, values: Float[Array, "..."]) -> Codes:
    """Codes at the same places, with values in the order of `entries`."""
    if isinstance(codes, Sparse | Pairs):
        return dataclasses.replace(codes, values=values)
    return values


def strengths(codes: Codes) -> Float[Array, "B _"]:
    """All values of each row that may be non-zero, in no particular order."""
    return to_dense(codes) if isinstance(codes, Pairs) else entries(codes)


def n_rows(codes: Codes) -> int:
    """Of how many rows these are the codes."""
    return codes.n_rows if isinstance(codes, Pairs) else len(entries(codes))


def l0(codes: Codes) -> Int[Array, " B"]:
    """Number of active features per row."""
    if isinstance(codes, Pairs):
        active = (codes.values != 0).astype(jnp.int32)
        return jnp.zeros(codes.n_rows, jnp.int32).at[codes.rows].add(active)
    # A sum of floats is eight times as fast as one of booleans, and exact here.
    return jnp.where(entries(codes) != 0, 1.0, 0.0).sum(1).astype(jnp.int32)


def norm(codes: Codes) -> Float[Array, " B"]:
    """Euclidean norm per row, with gradient 0 (not NaN) at the zero code."""
    squares = jnp.square(entries(codes))
    if isinstance(codes, Pairs):
        squares = jnp.zeros(codes.n_rows, squares.dtype).at[codes.rows].add(squares)
    else:
        squares = squares.sum(1)
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def fired(codes: Codes, mask: Bool[Array, " B"] | None) -> Bool[Array, " F"]:
    """Which features are active in at least one valid row."""
    if isinstance(codes, Sparse | Pairs):
        codes = as_pairs(codes)
        active = codes.values != 0
        if mask is not None:
            active = active & mask[codes.rows]
        return jnp.zeros(codes.n_features, bool).at[codes.features].max(active)
    active = codes != 0
    return (active if mask is None else active & mask[:, None]).any(0)


def counts(codes: Codes, mask: Bool[Array, " B"]) -> Int[Array, " F"]:
    """On how many valid rows each feature is active."""
    if isinstance(codes, Sparse | Pairs):
        codes = as_pairs(codes)
        active = ((codes.values != 0) & mask[codes.rows]).astype(jnp.int32)
        return jnp.zeros(codes.n_features, jnp.int32).at[codes.features].add(active)
    return ((codes != 0) & mask[:, None]).astype(jnp.int32).sum(0)


def smallest(codes: Codes) -> Float[Array, ""]:
    """The smallest positive value; infinite where there is none."""
    values = entries(codes)
    return jnp.where(values > 0, values, jnp.inf).min()


def smallest_of_each(codes: Codes) -> Float[Array, " F"]:
    """The smallest positive value of each feature; infinite where there is none."""
    values = entries(codes)
    values = jnp.where(values > 0, values, jnp.inf)
    if not isinstance(codes, Sparse | Pairs):
        return values.min(0)
    none = jnp.full(codes.n_features, jnp.inf, values.dtype)
    return none.at[as_pairs(codes).features].min(values.reshape(-1))


def astype(codes: Codes, dtype: Any) -> Codes:
    """The same codes with values of another type."""
    return with_entries(codes, entries(codes).astype(dtype))
