"""The optimiser chain, and the unit-norm constraint on decoder rows."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sae_jax import checks
from sae_jax.contract import Params
from sae_jax.piecewise import row_sums

Decay = Literal["constant", "cosine", "linear"]
DecoderNorm = Literal["after", "before", "free"]


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
        # Rows of matrices are summed first; vectors may be spread over devices.
        squares = [jnp.square(g) for g in jax.tree.leaves(grads)]
        sums = [(row_sums(s) if s.ndim > 1 else s).sum() for s in squares]
        norm = jnp.sqrt(sum(sums))
        factor = jnp.where(norm < most, 1, most / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return optax.stateless(clip)


def unit_rows(params: Params, *, where: Array | bool = True) -> Params:
    """Decoder rows divided by their norms; a row of zeros stays one.

    If not `where`, nothing changes.
    """
    rows = params["W_dec"]
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return {**params, "W_dec": rows / jnp.where((norms > 0) & where, norms, 1)}


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

    That part would only change the norm, which the constraint puts back.
    """
    g, rows = grads["W_dec"], params["W_dec"]
    squares = jnp.square(rows).sum(1)
    some = squares > 0
    # Choosing comes first: XLA makes a quotient in one go with the sum above it, and
    # writes the product of both matrices down for that.
    share = jnp.where(some, (g * rows).sum(1), 0) / jnp.where(some, squares, 1)
    return {**grads, "W_dec": g - share[:, None] * rows}
