"""Gated: one path decides which features are active, another how strongly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sae_jax import products
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


def gated(
    inputs: Inputs, params: Params, state: State, *, coef: float | Array = 1e-3
) -> Encoded:
    """Features with a positive gate are on, with the strength of their magnitude path.

    Rajamanoharan et al. 2024, arXiv:2404.16014. Both paths share the encoder: with
    `u = (x - b_dec) @ W_enc.T`, gate `pi = u + b_enc` and magnitude
    `m = relu(exp(r_mag) * u + b_mag)`, `codes = [pi > 0] * m`. Loss terms:
    `l1 = coef * mean_rows(sum_j relu(pi_j))` and `gate = mse(relu(pi) @ sg(W_dec) +
    sg(b_dec), target)`, which trains the gate, since [pi > 0] has no gradient.

    Differs: coefficients published for a loss summed over width are divided by D. The
    gate's bias is b_enc (SAELens and dictionary_learning name it b_gate).
    """
    gate = jax.nn.relu(inputs.pre)
    shared = inputs.pre - inputs.encoder.b_enc
    magnitude = jnp.exp(params["r_mag"]) * shared + params["b_mag"]
    active = jnp.where(inputs.pre > 0, jax.nn.relu(magnitude), 0)
    W_dec, b_dec = map(
        jax.lax.stop_gradient, (inputs.weights.W_dec, inputs.weights.b_dec)
    )
    from_gate = products.decode(gate, W_dec, inputs.encoder.dtype) + b_dec
    error = jnp.square(from_gate - inputs.target).mean(1)
    penalties = {"l1": Penalty(coef, gate.sum(1)), "gate": Penalty(1.0, error)}
    return Encoded(active, state, penalties)


def init(key: Array, params: Params) -> tuple[Params, State]:
    """Both paths start out equal."""
    zeros = jnp.zeros_like(params["b_enc"])
    return {**params, "r_mag": zeros, "b_mag": zeros}, {}


def export(params: Params, state: State) -> Counterpart:
    """The gate's bias is b_enc; the magnitude's scale and bias are extras."""
    return Counterpart("gate", {name: params[name] for name in ("r_mag", "b_mag")})


register(
    Rule(
        name="gated",
        paper="Rajamanoharan et al. 2024 (arXiv:2404.16014)",
        decides="sign of a gate path; L1 penalty on the gate alone",
        encode=gated,
        init=init,
        export=export,
        example={"coef": 0.02},
        knob="coef",
        knob_raises_l0=False,
        aux_k=False,
    )
)
