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


register(
    toy(
        "toy_tired",
        decides="a bias that grows with how often a feature fires",
        encode=toy_tired,
        init=toy_tired_init,
        example={"cost": 0.5},
        knob="cost",
        knob_raises_l0=False,
    )
)


def toy_best_rows(inputs, params, state, *, train: bool, share: float | Array = 0.25):
    """Batch coupling: each feature stays on in its best rows; later, above a bar."""
    pre = jax.nn.relu(inputs.pre)
    if not train:
        return Encoded(jnp.where(pre > state["bar"], pre, 0), state, {})
    valid = jnp.ones(len(pre), bool) if inputs.mask is None else inputs.mask
    scores = jax.lax.stop_gradient(jnp.where(valid[:, None], pre, 0))
    count = jnp.ceil(share * valid.sum())
    chosen = select.columns(scores, count, count_max=len(pre)) & (scores > 0)
    active = jnp.where(chosen, pre, 0)
    least = jnp.where(chosen, scores, jnp.inf).min(0)
    bar = jnp.where(jnp.isfinite(least), least, state["bar"])
    return Encoded(active, {"bar": bar}, {})


def toy_best_rows_init(key, params):
    return params, {"bar": jnp.zeros_like(params["b_enc"])}


register(
    toy(
        "toy_best_rows",
        decides="the best rows of each feature; later a bar per feature",
        encode=toy_best_rows,
        init=toy_best_rows_init,
        example={"share": 0.25},
        knob="share",
        couples_batch=True,
    )
)


def toy_noisy(inputs, params, state, *, train: bool, sigma: float = 0.1):
    """Randomness: noise on the pre-activations in training."""
    pre = inputs.pre
    if train:
        pre = pre + sigma * jax.random.normal(inputs.key, pre.shape)
    return Encoded(jax.nn.relu(pre - 0.1), state, {})


register(
    toy(
        "toy_noisy",
        decides="sign, under noise while training",
        encode=toy_noisy,
        example={"sigma": 0.01},
        knob="sigma",
        needs=frozenset({"key"}),
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
