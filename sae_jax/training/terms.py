"""The terms of the loss, and what else is measured on a batch of training."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import checks, losses
from sae_jax.architecture import DType
from sae_jax.binding import BoundRule
from sae_jax.contract import State
from sae_jax.losses import AuxK
from sae_jax.variables import Forward


def dead(steps_idle: Array, aux: AuxK | None) -> Array:
    """Which features count as dead."""
    return steps_idle >= (AuxK() if aux is None else aux).dead_after


def underused(bound: BoundRule, state: State, knob: Array | None) -> Array | None:
    """Which features the rule calls underused; None where it has no such features."""
    rule = bound.rule
    if rule.underused is None:
        return None
    turned = {} if knob is None else {rule.knob: knob}
    return bound.call(rule.underused, state, **turned)


def revived(steps_idle: Array, underused: Array | None, aux: AuxK) -> Array:
    """Which features the auxiliary loss takes: dead ones, and underused if given."""
    found = dead(steps_idle, aux)
    return found if underused is None else found | underused


def unexplained(out: Forward, dtypes: Mapping[str, DType]) -> Array:
    """What the auxiliary loss starts from: the target less the last reconstruction."""
    assert out.target is not None  # training has one, or forward would have said so
    dtype = dtypes.get("aux", out.target.dtype)
    return out.target.astype(dtype) - out.x_hats[-1].astype(dtype)


def loss_terms(
    out: Forward,
    mask: Array | None,
    steps_idle: Array | None,
    aux: AuxK | None,
    *,
    underused: Array | None = None,
    dtypes: Mapping[str, DType] = MappingProxyType({}),
) -> dict[str, Array]:
    """The terms whose sum is the loss, each with its coefficient in it.

    `steps_idle` None says that the loss of dead features is added later.
    """
    assert out.target is not None  # training has one, or forward would have said so
    known = {"mse", "aux", *out.penalties}
    checks.raise_all(
        checks.unknown("loss term", name, known) for name in set(dtypes) - known
    )

    def cast(name: str, array: Array) -> Array:
        return array.astype(dtypes.get(name, array.dtype))

    target = cast("mse", out.target)
    scored = zip(out.coefficients, out.x_hats, strict=True)
    errors = [c * losses.mse(cast("mse", x), target, mask) for c, x in scored]
    terms: dict[str, Array] = {"mse": functools.reduce(jnp.add, errors)}
    for name, (coef, per_row) in out.penalties.items():
        terms[name] = coef * losses.mean_rows(cast(name, per_row), mask)
    if aux is not None:
        residual = unexplained(out, dtypes)
        terms["aux"] = jnp.zeros((), residual.dtype)
        if steps_idle is not None:
            weak, W_dec = revived(steps_idle, underused, aux), out.weights.W_dec
            terms["aux"] = losses.aux_k(aux, out.encoder, weak, W_dec, residual, mask)
    return terms


class Errors(NamedTuple):
    """What the NMSE of rows is made of, so that it can be pooled over sets of rows.

    Attributes:
      error: mean squared error of the output.
      centre: mean row of the target.
      spread: mean squared distance of the target's rows from their centre.
    """

    error: Float[Array, "*sets"]
    centre: Float[Array, "*sets D"]
    spread: Float[Array, "*sets"]


def errors(out: Forward, mask: Array | None) -> Errors:
    """Those of the rows of a pass."""
    assert out.target is not None
    centre = losses.mean_rows(out.target, mask)
    return Errors(
        error=losses.mse(out.x_hats[-1], out.target, mask),
        centre=centre,
        spread=losses.mse(centre[None], out.target, mask),
    )


def nmse(found: Errors, shares: Float[Array, " sets"]) -> Array:
    """Squared error over the spread of all rows around their one mean.

    `shares` says which part of the rows each set is. NaN where there is no spread, as
    in a batch of one row.
    """
    apart = jnp.square(found.centre - shares @ found.centre).mean(1)
    spread = shares @ (found.spread + apart)
    error = shares @ found.error
    return jnp.where(spread > 0, error / jnp.where(spread > 0, spread, 1), jnp.nan)
