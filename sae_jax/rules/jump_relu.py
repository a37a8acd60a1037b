"""JumpReLU: a learned threshold per feature, trained by straight-through kernels."""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax.contract import (
    Encoded,
    Inputs,
    Params,
    Penalty,
    Rule,
    State,
    register,
)
from sae_jax.counterpart import Counterpart


def kernel(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """1 within half a bandwidth of the threshold, 0 elsewhere."""
    return (jnp.abs(pre - threshold) < bandwidth / 2).astype(pre.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(
    pre: Float[Array, "B F"], threshold: Float[Array, " F"], bandwidth: float
) -> Float[Array, "B F"]:
    """`pre` above the threshold, 0 below.

    Gradients: 1 above the threshold for `pre`; for the threshold the pseudo-derivative
    `-(threshold / bandwidth) * kernel`.
    """
    return jnp.where(pre > threshold, pre, 0)


def _jump_forward(pre, threshold, bandwidth):
    return jump(pre, threshold, bandwidth), (pre, threshold)


def _jump_backward(bandwidth, saved, g):
    pre, threshold = saved
    d_threshold = -(threshold / bandwidth) * kernel(pre, threshold, bandwidth) * g
    return jnp.where(pre > threshold, g, 0), d_threshold.sum(0)


jump.defvjp(_jump_forward, _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(
    pre: Float[Array, "B F"], threshold: Float[Array, " F"], bandwidth: float
) -> Float[Array, "B F"]:
    """1 above the threshold, 0 below.

    Gradients: none for `pre`; for the threshold `-(1 / bandwidth) * kernel`.
    """
    return (pre > threshold).astype(pre.dtype)


def _step_forward(pre, threshold, bandwidth):
    return step(pre, threshold, bandwidth), (pre, threshold)


def _step_backward(bandwidth, saved, g):
    pre, threshold = saved
    d_threshold = -(1 / bandwidth) * kernel(pre, threshold, bandwidth) * g
    return jnp.zeros_like(pre), d_threshold.sum(0)


step.defvjp(_step_forward, _step_backward)


def jump_relu(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    coef: float | Array = 1e-3,
    bandwidth: float = 0.05,
    variant: Literal["paper", "lee2025_code"] = "paper",
) -> Encoded:
    """Keeps pre-activations above a learned threshold; the loss pays for their number.

    Rajamanoharan et al. 2024, arXiv:2407.14435: `codes = pre * (pre > threshold)`, loss
    term `coef * mean_rows(sum_j [pre_j > threshold_j])`, both with pseudo-derivatives
    for the threshold (`jump`, `step`). The threshold is stored as its logarithm, so it
    stays positive, and the chain rule multiplies both derivatives by it.

    `variant="lee2025_code"` repeats the class that the BatchTopK and Top-AFA code
    share, for replication only. It returns the derivative for the threshold as that
    for its logarithm, counts features after the jump, not before (so the kernel sees 0
    for whatever is just below the threshold) and in float32 throughout, and applies a
    ReLU ahead of the jump. To repeat it in full, `centre=False` as well.

    Differs: coefficients published for a loss summed over width are divided by D;
    bandwidth and first threshold are in units of treated inputs (0.05: SAELens).
    """
    if variant == "paper":
        threshold, pre = jnp.exp(params["log_threshold"]), inputs.pre
        active = jump(pre, threshold, bandwidth)
        n_active = step(pre, threshold, bandwidth).sum(1)
    else:
        threshold = _unscaled_exp(params["log_threshold"])
        active = jump(jax.nn.relu(inputs.pre), threshold, bandwidth)
        counted = active.astype(jnp.float32), threshold.astype(jnp.float32)
        n_active = step(*counted, bandwidth).sum(1)
    return Encoded(active, state, {"l0": Penalty(coef, n_active)})


def _unscaled_exp(x: Array) -> Array:
    """`exp(x)` with the gradient of x itself."""
    return jax.lax.stop_gradient(jnp.exp(x) - x) + x


def init(
    key: Array, params: Params, *, first_threshold: float = 0.05
) -> tuple[Params, State]:
    """All thresholds start at the same value."""
    threshold = jnp.full_like(params["b_enc"], first_threshold)
    return {**params, "log_threshold": jnp.log(threshold)}, {}


def faults(
    n_features: int, *, bandwidth: float, first_threshold: float
) -> Iterable[str]:
    """A threshold and its kernel must have a size."""
    if bandwidth == 0:
        yield "bandwidth=0 gives thresholds no gradient; 0.05 suits inputs of scale 1."
    if first_threshold == 0:
        yield "first_threshold=0 has no logarithm; 0.05 suits inputs of scale 1."


def export(params: Params, state: State) -> Counterpart:
    """The thresholds themselves, not their logarithms."""
    return Counterpart("above", {"threshold": jnp.exp(params["log_threshold"])})


register(
    Rule(
        name="jump_relu",
        paper="Rajamanoharan et al. 2024 (arXiv:2407.14435)",
        decides="a learned threshold per feature; L0 penalty",
        encode=jump_relu,
        init=init,
        export=export,
        example={"coef": 0.02, "bandwidth": 0.5, "first_threshold": 0.2},
        knob="coef",
        knob_raises_l0=False,
        faults=faults,
        aux_k=False,
    )
)
