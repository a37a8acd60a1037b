"""The optimiser chain, and the unit-norm constraint on decoder rows."""

from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from sae_jax import checks
from sae_jax.contract import Params

Decay = Literal["constant", "cosine", "linear"]
DecoderNorm = Literal["start", "before", "free"]


def learning_rate(
    peak: float, steps: int, *, warmup: int = 0, decay: Decay = "constant"
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then constant, cosine to 0 or linear to 0."""
    faults = [
        checks.value_fault("lr", peak, float),
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
    chain = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return optax.chain(*chain, optax.adam(lr, b1=b1, b2=b2, eps=eps))


def unit_rows(params: Params) -> Params:
    """Decoder rows divided by their norms; a row of zeros stays one."""
    W_dec = params["W_dec"]
    norm = jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    return {**params, "W_dec": W_dec / jnp.where(norm > 0, norm, 1)}


def finished(params: Params, decoder_norm: DecoderNorm) -> Params:
    """The parameters as they leave training.

    Under "start" the optimiser's last step has not been normalised yet.
    """
    return unit_rows(params) if decoder_norm == "start" else params


def waiting(grads: Params, norm: Array) -> Params:
    """The same gradients, each of which now depends on all of them through their norm.

    Else XLA does not know that a matrix has been read for the last time when its
    update is written over it, and copies both first (30 ms at D=768, F=12288).
    """
    one = jnp.where(jnp.isfinite(norm), 1, jnp.nan)
    return {name: g * one.astype(g.dtype) for name, g in grads.items()}


def project(grads: Params, params: Params) -> Params:
    """Takes from each decoder row's gradient the part along the row.

    That part would only change the norm, which the constraint puts back.
    """
    rows = unit_rows(params)["W_dec"]
    along = (grads["W_dec"] * rows).sum(1, keepdims=True)
    return {**grads, "W_dec": grads["W_dec"] - along * rows}
