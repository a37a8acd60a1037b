"""Variational TopK: codes drawn around a mean, which pay for being far from 0."""

import math
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import codes, products, select
from sae_jax.contract import (
    Encoded,
    Inputs,
    Params,
    Penalty,
    Rule,
    State,
    budget_faults,
    plain_fold,
    register,
)

Variance = Literal["learned", "unit", "none"]


def variational(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    train: bool,
    k: int | Array = 32,
    k_max: float,
    coef: float = 1e-3,
    warmup: int = 0,
    over: Literal["all", "kept"] = "all",
    variance: Variance = "learned",
) -> Encoded:
    """Keeps the k codes of largest size of each row, with their sign.

    Baker, Li et al. 2025, arXiv:2509.22994. With `mean = x @ W_enc.T + b_enc` and
    `log_variance = x @ W_var.T + b_var`, clipped to [-6, 2], training draws
    `z = mean + exp(log_variance / 2) * N(0, 1)`; in evaluation `z = mean`. `codes = z`
    where |z| is among the k largest of its row. Loss term: `coef * ramp * mean_rows(
    sum_j kl_j)`, the distance to N(0, 1) of `kl`, over all features or over those that
    were kept (which public code does; which one the paper does is not known). The ramp
    rises from 0 to 1 within `warmup` steps.

    `variance="unit"` draws with a variance of 1 (the authors' post); "none" draws
    nothing (what their code calls fixed variance). In both the term is mean**2 / 2.

    Differs: the authors' loss is summed over width, so their coefficients are divided
    by D (the paper's is not known, their code's default is 1). Their warm-up takes 10 %
    of the run, whose length a rule does not know; by default there is none. The package
    starts with decoder rows of norm 1, not 0.1, and keeps them there unless
    `decoder_norm` is "free". Its AuxK revives dead features by their positive
    pre-activations, theirs by |z|. Only selection by |z| is known.

    As theirs, it reads x without b_dec taken from it.

    Needs: a key, in training.
    """
    mean = inputs.encoder
    if not train:
        chosen = select.rows(jnp.abs(mean.pre), k, count_max=math.ceil(k_max))
        return Encoded(select.keep(mean, chosen, signed=True), state, {})
    spread = None
    z = mean.pre
    if variance != "none":
        assert inputs.key is not None  # `needs` says so
        noise = jax.random.normal(inputs.key, z.shape, z.dtype)
        if variance == "learned":
            factors = mean.x, params["W_var"], params["b_var"], mean.b_pre
            spread = products.encoder_product(*factors, mean.dtype)
            z = z + deviation(spread.pre) * noise
        else:
            z = z + noise
    chosen = select.rows(jnp.abs(z), k, count_max=math.ceil(k_max))
    active = select.keep(mean, chosen, signed=True)
    # Places that were not kept have a mean of 0 and a variance of 1, so no distance.
    means = codes.entries(active)
    log_variances = jnp.zeros_like(means)
    if spread is not None:
        log_variances = codes.entries(select.keep(spread, chosen, signed=True))
    if variance != "none":
        drawn = select.keep(replace(mean, pre=noise), chosen, signed=True)
        drawn = jax.lax.stop_gradient(codes.entries(drawn))
        drawn = means + deviation(log_variances) * drawn
        active = codes.with_entries(active, drawn)
    if over == "all":
        means = mean.pre
        log_variances = jnp.zeros_like(means) if spread is None else spread.pre
    ramp = jnp.minimum(inputs.step / warmup, 1) if warmup else 1.0
    distance = kl(means, log_variances).sum(1)
    return Encoded(active, state, {"kl": Penalty(coef * ramp, distance)})


def deviation(log_variance: Array) -> Array:
    """Standard deviations, of variances between exp(-6) and exp(2)."""
    return jnp.exp(jnp.clip(log_variance, -6, 2) / 2)


def kl(mean: Float[Array, "B K"], log_variance: Array) -> Float[Array, "B K"]:
    """`(mean**2 + variance - 1 - log_variance) / 2`, the mean clipped to [-10, 10]."""
    mean, log_variance = jnp.clip(mean, -10, 10), jnp.clip(log_variance, -6, 2)
    return (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / 2


def init(
    key: Array, params: Params, *, variance: Variance = "learned"
) -> tuple[Params, State]:
    """A variance of exp(-2), the authors', whatever the row (not known: 0 here)."""
    if variance != "learned":
        return params, {}
    W_var = jnp.zeros_like(params["W_enc"])
    return {**params, "W_var": W_var, "b_var": jnp.full_like(params["b_enc"], -2)}, {}


def fold(params: Params, scale_in: Array, scale_out: Array) -> Params:
    """The variance reads the same rows as the mean."""
    folded = plain_fold(params, scale_in, scale_out)
    if "W_var" in params:
        folded["W_var"] = params["W_var"] * scale_in
    return folded


register(
    Rule(
        name="variational",
        paper="Baker, Li et al. 2025 (arXiv:2509.22994)",
        decides="the k largest of each row by size, drawn around a mean; KL penalty",
        encode=variational,
        example={"k": 4, "coef": 0.001},
        knob="k",
        budget="k",
        init=init,
        fold=fold,
        export="Its codes keep their sign, which no format that is written has.",
        faults=budget_faults,
        needs=frozenset({"key"}),
        signed=True,
        centres=False,
    )
)
