"""Gradient TopK (g-SAE): which features stay on depends on the model's loss as well."""

import math
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import products, select
from sae_jax.contract import (
    Inputs,
    Params,
    Rule,
    State,
    budget_faults,
    from_selection,
    register,
)
from sae_jax.counterpart import Counterpart

Mode = Literal["add", "attribution"]


def score(
    pre: Float[Array, "B F"],
    effect: Float[Array, "B F"],
    *,
    beta: float,
    mode: Mode,
) -> Float[Array, "B F"]:
    """What features are ranked by; `effect` is `|grad_x @ W_dec.T|`."""
    term = beta * pre * effect
    if mode == "add":
        return pre + term
    return jnp.where(term == 0, 0, term)  # else -0 ranks below 0


def gradient_topk(
    inputs: Inputs,
    *,
    k: int | Array = 32,
    beta: float = 1.0,
    mode: Mode = "add",
    normalise: bool = False,
    k_max: float,
) -> select.Selection:
    """Keeps the k features of each row that are strong and that the loss feels.

    Olmo et al. 2024, arXiv:2411.10397. To first order, taking feature j away changes
    the model's loss by `-codes_j * (W_dec[j] . grad_x)`. So with `grad_x` the gradient
    of the summed token losses of the plain forward pass,

        score = pre + beta * pre * |grad_x @ W_dec.T|

    and `codes = relu(pre)` on the k largest scores of each row, 0 elsewhere. The
    gradient chooses and is no part of the values; nothing is learned through the score.

    `mode="attribution"` ranks by the second term alone, and rows without any gradient,
    as the last of a context is, by `pre`. `normalise` divides each row's gradient by
    its norm: where the model is confident its loss has next to no gradient, and rows
    differ in it by orders of magnitude.

    Differs: that the term is added to `pre` is our reading of the paper's words;
    which losses are summed, k and beta were not found. beta = 1 is our choice,
    untested on large models, and has the unit of 1 / gradient: a gradient c times as
    large asks for beta / c. Norms of rows are our option too; one norm for a whole
    batch would couple its rows and be no more than another beta.

    Needs: the gradient, in training. It knows the tokens that come after the row, so an
    SAE with it at hand has an advantage over one without; new text is encoded without
    it, by the k largest pre-activations. An autoencoder: what a transcoder writes is
    not where the gradient is taken.
    """
    count_max = math.ceil(k_max)
    if inputs.grad_x is None or (mode == "add" and beta == 0):
        return select.rows(inputs.encoder, k, count_max=count_max)
    grad_x = inputs.grad_x
    if normalise:
        norm = jnp.linalg.norm(grad_x, axis=1, keepdims=True)
        grad_x = grad_x / jnp.where(norm > 0, norm, 1)
    effect = products.dot(grad_x, inputs.weights.W_dec.T, inputs.encoder.dtype)
    pre, effect = jax.lax.stop_gradient((inputs.pre, jnp.abs(effect)))
    scores = score(pre, effect, beta=beta, mode=mode)
    felt = (grad_x != 0).any(1, keepdims=True)
    return select.rows(jnp.where(felt, scores, pre), k, count_max=count_max)


def faults(n_features: int, *, k: float, beta: float, mode: Mode) -> Iterable[str]:
    """A budget that fits, and something to rank by."""
    yield from budget_faults(n_features, k=k)
    if mode == "attribution" and beta == 0:
        yield "beta=0 leaves mode='attribution' nothing to rank by; give beta=1."


def export(params: Params, state: State, *, k: int) -> Counterpart:
    """What it is to new text, which comes without gradients."""
    return Counterpart("largest", settings={"k": math.ceil(k)})


register(
    Rule(
        name="gradient_topk",
        paper="Olmo et al. 2024 (arXiv:2411.10397)",
        decides="the k largest of pre-activation times effect on the model's loss",
        encode=from_selection(gradient_topk),
        export=export,
        example={"k": 4, "beta": 1.0},
        knob="k",
        budget="k",
        faults=faults,
        needs=frozenset({"grad_x", "autoencoder"}),
        without_gradient="by the k largest pre-activations, as plain TopK",
    )
)
