"""Matching pursuit: features chosen one after another, each for what is left."""

import math

import jax.numpy as jnp
from jaxtyping import Array

from sae_jax import pursuit
from sae_jax.contract import (
    Encoded,
    Inputs,
    Params,
    Rule,
    State,
    Weights,
    budget_faults,
    register,
)
from sae_jax.counterpart import Counterpart


def matching_pursuit(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    k: int | Array = 32,
    k_max: float,
    tau: float = 0.0,
    until_repeat: bool = False,
) -> Encoded:
    """Takes k times the feature that explains most of what is left of the row.

    Costa, Fel, Lubana, Tolooshams, Ba 2025, arXiv:2506.03093. With `d_j` the rows of
    `W_dec`, which encode as well, and `r = x - b_dec`, k times:
    `j = argmax_j d_j . r / ||d_j||`, `c = relu(d_j . r / ||d_j||**2)`,
    `codes_j += c`, `r -= c * d_j`. The maximum is signed: where no feature points along
    what is left, a row takes no more. Gradients flow through c and `W_dec`, not
    through the choice. Nothing learned depends on k, `tau` or `until_repeat`: the
    same variables may be used with others, and more steps never raise the error.

    A row stops early once `||r|| < tau` (in units of treated inputs; 0: never), looked
    at after each step, or, with `until_repeat`, once it takes a feature again. Their
    code for vision takes k steps; their synthetic code and SAELens (`max_iterations`,
    `residual_threshold`, `stop_on_duplicate_support`) may stop by both.

    Differs: rows of `W_dec` need not have norm 1. The norms are divided out as above,
    so that the reconstruction does not depend on them and codes count in units of the
    rows. Their synthetic code takes `c = d_j . r` whatever the norm, which leaves
    part of d_j in r; SAELens as well, but starts from norm 1 and keeps it in training.
    What is within rounding errors of 0 is not taken. A feature taken twice has one
    code, the sum. A fractional k is rounded up. There is no b_enc, and no penalty on
    codes, which the paper names as an option.

    No source revives dead features by `AuxK`, so it is off unless asked for. Then it
    takes them, as with any rule, by their products with x, which is not how this rule
    encodes.

    Needs: an autoencoder, since what is left of a transcoder's target is not known. Its
    options `centre` and `encoder_bias` stay as they are by default: the steps explain
    `x - b_dec` and there is no bias to add.
    """
    path = pursuit.pursue(
        inputs.x_centred,
        inputs.weights.W_dec,
        k,
        min(math.ceil(k_max), inputs.weights.W_dec.shape[0]),
        pursuit.Stop(tau, until_repeat),
        inputs.encoder.dtype,
    )
    active = pursuit.merged(path, inputs.weights.W_dec.shape[0])
    return Encoded(active, state, {})


def init(key: Array, params: Params) -> tuple[Params, State]:
    """One dictionary and its centre."""
    return {name: params[name] for name in ("W_dec", "b_dec")}, {}


def weights(params: Params, state: State) -> Weights:
    """The dictionary encodes and decodes."""
    W_dec = params["W_dec"]
    return Weights(W_dec, jnp.zeros_like(W_dec[:, 0]), W_dec, params["b_dec"])


def fold(params: Params, scale_in: Array, scale_out: Array) -> Params:
    """Shorter rows for shorter inputs; the product of both is what counts."""
    return {name: param / scale_out for name, param in params.items()}


def export(
    params: Params, state: State, *, k: float, tau: float, until_repeat: bool
) -> Counterpart:
    """Rows of norm 1, as others need them; codes then count in units of those."""
    W_dec = params["W_dec"]
    lengths = jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    settings = {
        "max_iterations": math.ceil(k),
        "residual_threshold": tau,
        "stop_on_duplicate_support": until_repeat,
    }
    # What is 1 but for rounding stays, so that a second export changes nothing.
    off = (lengths > 0) & (jnp.abs(lengths - 1) > 1e-6)
    arrays = {"W_dec": W_dec / jnp.where(off, lengths, 1)}
    return Counterpart("pursuit", arrays, settings)


register(
    Rule(
        name="matching_pursuit",
        paper="Costa et al. 2025 (arXiv:2506.03093)",
        decides="k times what explains most of the rest; tied dictionary",
        encode=matching_pursuit,
        init=init,
        weights=weights,
        fold=fold,
        lengths=("tau",),
        export=export,
        example={"k": 4},
        knob="k",
        budget="k",
        faults=budget_faults,
        needs=frozenset({"autoencoder"}),
        iterative=True,
        reads_b_enc=False,
        aux_k=False,
    )
)
