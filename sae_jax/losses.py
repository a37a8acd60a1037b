"""Losses. One scale everywhere: the mean over rows and over width ("mean-MSE").

Coefficients published for a squared error summed over width are divided by D where
they enter this package; docstrings say so.
"""

import dataclasses
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sae_jax import checks, mesh, products, select


def mean_rows(
    per_row: Float[Array, "B ..."], mask: Bool[Array, " B"] | None
) -> Float[Array, "..."]:
    """The mean over valid rows; 0 where there is none.

    Summed in the widest type that JAX is set to, whatever the type of the values.
    """
    widest = jax.dtypes.canonicalize_dtype(jnp.float64)
    if mask is None:
        return per_row.astype(widest).mean(0).astype(per_row.dtype)
    valid = mask.reshape(-1, *(1,) * (per_row.ndim - 1))
    total = jnp.where(valid, per_row, 0).astype(widest).sum(0)
    return (total / jnp.maximum(mask.sum(), 1)).astype(per_row.dtype)


def mse(
    x_hat: Float[Array, "#B D"],
    target: Float[Array, "B D"],
    mask: Bool[Array, " B"] | None,
) -> Float[Array, ""]:
    """`mean((x_hat - target)**2)` over valid rows and width."""
    squares = jnp.square(x_hat - target)
    if mask is None:
        return mean_rows(squares.reshape(-1), None)
    return mean_rows(squares.mean(1), mask)


@dataclasses.dataclass(frozen=True)
class AuxK:
    """Auxiliary loss that lets dead features model what is left unexplained.

    With e = target - x_hat and e_hat the decoding of the k strongest dead features of
    each row: `coef * mean((e_hat - e)**2)`, divided by the variance of e where
    `normalise`. Features that the rule calls underused count as dead here. Gao et al.
    2024, arXiv:2406.04093, normalise; the BatchTopK and Top-AFA authors' code does
    not, which keeps the term on the scale of the mean-MSE.

    Differs: e is a constant here (`detach`), as in Gao et al. and unlike the Top-AFA
    authors' code, where the live features also feel this loss.
    """

    k: Annotated[int, "dead features per row, at most (512: Top-AFA authors' code)"] = (
        512
    )
    coef: Annotated[float, "weight of the term (1/32: all sources)"] = 1 / 32
    dead_after: Annotated[
        int,
        "steps without firing after which a feature counts as dead (20: Matryoshka "
        "authors' code; 5 in the Top-AFA authors' code)",
    ] = 20
    normalise: Annotated[
        bool, "divide by the variance of the residual over the batch"
    ] = False
    detach: Annotated[bool, "treat the residual as a constant"] = True

    def __post_init__(self) -> None:
        checks.raise_all(checks.field_faults("AuxK ", self))
        if self.k == 0 or self.dead_after == 0:
            raise ValueError(
                f"AuxK k={self.k}, dead_after={self.dead_after} must both be above 0; "
                f"to do without the loss pass aux=None."
            )


def aux_k(
    aux: AuxK,
    encoder: products.Encoder,
    dead: Bool[Array, " F"],
    W_dec: Float[Array, "F D"],
    residual: Float[Array, "B D"],
    mask: Bool[Array, " B"] | None,
) -> Float[Array, ""]:
    """The loss of `AuxK`."""
    if aux.detach:
        residual = jax.lax.stop_gradient(residual)
    given = encoder, dead, W_dec
    k = min(aux.k, dead.size)

    def nothing(*_: Any) -> Array:
        return jnp.zeros(residual.shape, jnp.promote_types(jnp.float32, encoder.dtype))

    kinds = nothing, partial(decode_all, k=k), partial(decode_strongest, k=k)
    e_hat = jax.lax.switch(how_many(dead, k), kinds, *given).astype(residual.dtype)
    weight = aux_weight(aux, dead, residual, mask)
    return (weight * mse(e_hat, residual, mask)).astype(residual.dtype)


def aux_weight(
    aux: AuxK,
    dead: Bool[Array, " F"],
    residual: Float[Array, "B D"],
    mask: Bool[Array, " B"] | None,
) -> Float[Array, ""]:
    """What the squared error is multiplied by: 0 where no feature is dead."""
    weight = jnp.where(dead.any(), jnp.asarray(aux.coef, residual.dtype), 0)
    if not aux.normalise:
        return weight
    spread = mse(mean_rows(residual, mask)[None], residual, mask)
    return weight / jnp.where(spread > 0, spread, 1)


def how_many(dead: Bool[Array, " F"], k: int) -> Int[Array, ""]:
    """0 where no feature is dead, 1 where at most k are, as is usual, 2 where more."""
    n_dead = dead.sum()
    return mesh.for_any(n_dead > 0).astype(int) + mesh.for_any(n_dead > k)


def decode_all(
    encoder: products.Encoder, dead: Bool[Array, " F"], W_dec: Array, *, k: int
) -> Float[Array, "B D"]:
    """The decoding of all dead features, of which there are k at most.

    It is that of a small dense SAE of their rows, at k/F of the products' cost.
    """
    which = jnp.nonzero(dead, size=k)[0]
    rows, bias = encoder.W_enc[which], encoder.b_enc[which]
    rest = encoder.x, rows, bias, encoder.b_pre, encoder.dtype
    revived = jax.nn.relu(products.preactivations(*rest))
    revived = jnp.where(jnp.arange(k) < dead.sum(), revived, 0)
    return products.decode(revived, W_dec[which], encoder.dtype)


def decode_strongest(
    encoder: products.Encoder, dead: Bool[Array, " F"], W_dec: Array, *, k: int
) -> Float[Array, "B D"]:
    """The decoding of the k strongest dead features of each row."""
    # Encoded again: kept for this, pre-activations would be kept in every step.
    factors = encoder.x, encoder.W_enc, encoder.b_enc, encoder.b_pre
    again = products.encoder_product(*factors, encoder.dtype)
    scores = jnp.where(dead, again.pre, -jnp.inf)
    chosen = select.rows(scores, dead.sum(), count_max=k)
    return products.decode(select.keep(again, chosen), W_dec, encoder.dtype)
