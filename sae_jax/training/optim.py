"""The optimiser chain, and the unit-norm constraint on decoder rows."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sae_jax import checks, mesh
from sae_jax.contract import Params
from sae_jax.piecewise import by_rows, in_place

Decay = Literal["constant", "cosine", "linear"]
DecoderNorm = Literal["after", "before", "free"]

ROWS_AT_ONCE = 1024  # of a matrix at a time; they stay in the cache


def learning_rate(
    peak: float | Array, steps: int, *, warmup: int = 0, decay: Decay = "constant"
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then constant, cosine to 0 or linear to 0."""
    faults = [
        None if checks.is_traced(peak) else checks.value_fault("lr", peak, float),
        checks.value_fault("steps", steps, int),
        checks.value_fault("warmup", warmup, int),
        checks.value_fault("decay", decay, Decay),
    ]
    if not any(faults) and warmup > steps:
        faults.append(f"warmup={warmup} is longer than the run, steps={steps}.")
    checks.raise_all(filter(None, faults))
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[decay]
    if warmup == 0:
        return after
    ramp = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def adam(
    lr: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """Adam behind clipping by the global norm of the gradients (None: no clipping)."""
    faults = [
        checks.value_fault(name, value, float | None)
        for name, value in dict(b1=b1, b2=b2, eps=eps, clip=clip).items()
    ]
    checks.raise_all(filter(None, faults))
    chain = [] if clip is None else [clipping(clip)]
    return optax.chain(*chain, optax.adam(lr, b1=b1, b2=b2, eps=eps))


def clipping(most: float) -> optax.GradientTransformation:
    """Gradients whose global norm is above `most`, scaled to it.

    What `optax.clip_by_global_norm` does, but by one factor: that divides each entry,
    which XLA keeps for the two moments of Adam in a copy of all gradients.
    """

    def clip(grads: Any, params: Any) -> Any:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm < most, 1, most / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return optax.stateless(clip)


def unit_rows(params: Params) -> Params:
    """Decoder rows divided by their norms; a row of zeros stays one.

    Some rows at a time, in place: all at once, XLA takes another matrix's memory and
    three times as long.
    """

    def normalise(rows: Array, _: Any) -> Array:
        norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
        return rows / jnp.where(norm > 0, norm, 1)

    def part(W_dec: Array) -> Array:
        return in_place(normalise, ROWS_AT_ONCE, W_dec)

    W_dec = mesh.on_each(part, mesh.FEATURES, mesh.FEATURES)(params["W_dec"])
    return {**params, "W_dec": W_dec}


def waiting(grads: Params, norm: Array) -> Params:
    """The same gradients, each of which now depends on all of them through their norm.

    Else XLA does not know that a matrix has been read for the last time when its
    update is written over it, and copies both first (30 ms at D=768, F=12288). A norm
    that is not finite makes all of them NaN.
    """
    one = jnp.where(jnp.isfinite(norm), 1, jnp.nan)
    return {name: g * one.astype(g.dtype) for name, g in grads.items()}


def project(grads: Params, params: Params) -> Params:
    """Takes from each decoder row's gradient the part along the row.

    That part would only change the norm, which the constraint puts back. How long it is
    is found for some rows at a time: for all at once, XLA writes down another matrix.
    """
    g, rows = grads["W_dec"], params["W_dec"]

    def along(g: Array, rows: Array) -> Array:
        squares = jnp.square(rows).sum(1)
        return (g * rows).sum(1) / jnp.where(squares > 0, squares, 1)

    def part(g: Array, rows: Array) -> Array:
        return by_rows(along, ROWS_AT_ONCE, g, rows)

    share = mesh.on_each(part, (mesh.FEATURES, mesh.FEATURES), mesh.FEATURES)(g, rows)
    return {**grads, "W_dec": g - share[:, None] * rows}
