"""Rules as a user writes them, one for each thing that the contract can say."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from sae_jax import (
    Encoded,
    Penalty,
    Rule,
    Weights,
    from_pre,
    from_selection,
    register,
    select,
)

toy = partial(Rule, paper="none: a toy for the tests", aux_k=False)


def toy_soft_shrink(pre, *, amount: float | Array = 0.1):
    """A plain function of the pre-activations."""
    return jax.nn.relu(pre - amount)


register(
    toy(
        "toy_soft_shrink",
        decides="a constant taken from every pre-activation",
        encode=from_pre(toy_soft_shrink),
        example={"amount": 0.1},
        knob="amount",
        knob_raises_l0=False,
    )
)


def toy_scaled(inputs, params, state, *, coef: float | Array = 0.02):
    """A learned extra: one scale per feature. A loss term of its own."""
    active = jax.nn.relu(inputs.pre) * params["scale"]
    return Encoded(active, state, {"sum": Penalty(coef, active.sum(1))})


def toy_scaled_init(key, params):
    return {**params, "scale": jnp.ones_like(params["b_enc"])}, {}


register(
    toy(
        "toy_scaled",
        decides="sign; a learned scale per feature",
        encode=toy_scaled,
        init=toy_scaled_init,
        example={"coef": 0.02},
        knob="coef",
        knob_raises_l0=False,
    )
)


def toy_tired(inputs, params, state, *, train: bool, cost: float | Array = 0.5):
    """Memory that no gradient updates: features that fire often get a lower bias."""
    active = jax.nn.relu(inputs.pre - cost * state["rate"])
    if train:
        valid = jnp.ones(active.shape[0]) if inputs.mask is None else inputs.mask
        rate = (valid[:, None] * (active > 0)).sum(0) / jnp.maximum(valid.sum(), 1)
        state = {"rate": 0.9 * state["rate"] + 0.1 * rate}
    return Encoded(active, state, {})


def toy_tired_init(key, params):
    return params, {"rate": jnp.zeros_like(params["b_enc"])}


def toy_tired_rare(state, *, rare: float = 0.02):
    """Underused: features that the auxiliary loss takes besides dead ones."""
    return state["rate"] < rare


register(
    toy(
        "toy_tired",
        decides="a bias that grows with how often a feature fires",
        encode=toy_tired,
        init=toy_tired_init,
        underused=toy_tired_rare,
        aux_k=True,
        example={"cost": 0.5},
        knob="cost",
        knob_raises_l0=False,
    )
)


def toy_decoder_topk(inputs, *, k: int | Array = 4, k_max: int):
    """The decoder: the score counts the length of the decoder row."""
    lengths = jnp.linalg.norm(inputs.weights.W_dec, axis=1)
    return select.rows(inputs.pre * lengths, k, count_max=int(k_max))


topk_like = partial(toy, example={"k": 4}, knob="k", budget="k", knob_raises_l0=True)
register(
    topk_like(
        "toy_decoder_topk",
        decides="the k largest contributions",
        encode=from_selection(toy_decoder_topk),
    )
)


def toy_tied_init(key, params):
    """Tied weights: there is no encoder of its own among the parameters."""
    return {name: p for name, p in params.items() if name != "W_enc"}, {}


def toy_tied_weights(params, state):
    W_dec = params["W_dec"]
    return Weights(W_dec, params["b_enc"], W_dec, params["b_dec"])


register(
    toy(
        "toy_tied",
        decides="a constant taken from every pre-activation; tied dictionary",
        encode=from_pre(toy_soft_shrink),
        init=toy_tied_init,
        weights=toy_tied_weights,
        example={"amount": 0.1},
        knob="amount",
        knob_raises_l0=False,
        fold=None,
        needs=frozenset({"autoencoder"}),
    )
)
