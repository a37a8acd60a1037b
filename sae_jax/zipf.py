"""How often features fire, and how often they would by Zipf's law.

Rules that care keep `firings [F]` in their state: for each feature an exponential
moving average of the number of rows of a batch on which it is active. It starts at 0,
which does no harm where features are only compared with one another, as here.

By Zipf's law the feature that fires r-th most often has a share of all firings

    w_r = (r + q) ** -alpha / sum_s (s + q) ** -alpha,    r = 1 .. F

and alpha = 0 says that all fire alike. Ties in rank go to the lower index.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax import codes
from sae_jax.contract import Params, State


def shares(n: int, alpha: float, q: float) -> np.ndarray:
    """The share of each rank, the most frequent first; they sum to 1."""
    weights = (np.arange(1.0, n + 1) + q) ** -alpha
    return weights / weights.sum()


def ranks(firings: Float[Array, " F"]) -> Int[Array, " F"]:
    """The rank of each feature, counted from 0."""
    order = jnp.argsort(-firings, stable=True)
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))


def firings_init(params: Params) -> State:
    """Memory of no batch."""
    return {"firings": jnp.zeros_like(params["b_enc"])}


def firings_update(
    state: State, active: codes.Codes, mask: Bool[Array, " B"] | None, decay: float
) -> State:
    """The memory with one more batch in it."""
    if mask is None:
        mask = jnp.ones(codes.n_rows(active), bool)
    before = state["firings"]
    now = codes.counts(active, mask).astype(before.dtype)
    return {"firings": decay * before + (1 - decay) * now}


def underused(
    state: State, *, alpha: float = 1.0, q: float = 0.0, underused_below: float = 0.1
) -> Bool[Array, " F"]:
    """Features that fire less than `underused_below` of what Zipf's law expects.

    It expects the mean of all features at most: where features fire alike, the first
    of them are far below the law, and as useful as any.
    """
    firings = state["firings"]
    law = np.minimum(shares(len(firings), alpha, q), 1 / len(firings))
    expected = firings.sum() * jnp.asarray(law, firings.dtype)[ranks(firings)]
    return firings < underused_below * expected


def budgets(
    shares: np.ndarray, total: Array | float, most: Array | int
) -> Int[Array, " F"]:
    """How many of `most` rows each rank gets, of `total` firings to be shared out.

    `m_r = max(1, round(c * w_r))`, and no more than `most`, which c makes up for: the
    sum is `total` but for rounding and for the ranks that are raised to 1.
    """
    rest = np.cumsum(shares[::-1])[::-1]  # the shares of a rank and of those after it
    law = jnp.asarray(shares)
    # If all ranks before this one have as much as there is, c is what the rest takes.
    c = (total - jnp.arange(len(law), dtype=law.dtype) * most) / jnp.asarray(rest)
    # Where all shall have as much as there is, rounding may put the last above it.
    c = c[jnp.argmax(c * law <= most * (1 + 1e-6))]
    wanted = jnp.maximum(jnp.round(c * law), 1)
    return jnp.minimum(wanted, most).astype(jnp.int32)
