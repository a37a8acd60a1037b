"""Group bias adaptation: biases that no gradient moves hold features to a frequency.

Chen, Sheen, Xiong, Wang, Yang 2025, arXiv:2506.14002. There is no sparsity loss. Each
feature has a frequency that it may not pass; one that fires more often gets a lower
bias, one that never fires a higher one. Frequencies fall from group to group, since
the features that are to be found are not equally frequent either.
"""

from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sae_jax.contract import (
    Encoded,
    Inputs,
    Params,
    Rule,
    State,
    Weights,
    register,
)
from sae_jax.counterpart import Counterpart

Form = Literal["jump", "shifted"]


def group_bias(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    train: bool,
    highest: float | Array = 0.1,
    lowest: float = 1e-3,
    groups: int = 10,
    every: int = 50,
    windows: int = 3,
    lower: float = 0.01,
    lift: float = 0.01,
    dead_below: float = 1e-6,
    form: Form = "jump",
) -> Encoded:
    """Features whose pre-activation is positive under an adapted bias.

    With unit rows w_m, `u = x @ w.T` and `pre = u + unit * bias`,
    `x_hat = sum_m scale_m * w_m * codes_m + b_dec`. Codes are `u * [pre > 0]` (the runs
    on language models) or, in `form="shifted"` (the theory), `relu(pre)`. Weights,
    scales and b_dec learn by the mean-MSE alone; how biases move is in `adapted`.

    Bias stays in [-1, 0], so inputs are to have norm 1. Here `unit`, the mean norm of
    rows in the buffer, stands in for that: it makes bias a fraction of it, and the rule
    the same under any scale of the inputs.

    Statistics are of a buffer, not of one batch: at a frequency of 1e-3 a batch of 512
    rows sees half an event. It holds the last `windows` stretches of `every` steps, of
    which the older ones saw older biases. Third-party code buffers 40,960 rows: 1.6 of
    them, at 512 rows a step; on planted data the longer a buffer, the more of the rare
    features reach their targets in time, since its largest values are larger. Of the
    pre-activations only how many are positive and the largest are read, so a count and
    a maximum per feature and window replace them. What is fed in pieces (`accumulate`)
    adapts after the first piece of the step.

    The targets fall from `highest` to `lowest` in geometric progression. Sources
    disagree about both: 0.5 and 1e-3 to 1e-4 as settings, 0.1 and 1e-4 in the text of
    the same note; on planted data 0.5 gave dense codes. One group, all at `highest`, is
    the paper's BA.

    Differs: b_dec is not taken from x unless the SAE is told to (`centre=True`), as in
    the paper. Its gradient then does what biases are for: on planted rows of norm 1 it
    grew longer than they are, and left half the features dead. For inputs far from 0
    start it from their mean. The published pseudo-code is said to swap minimum and
    maximum; this is the consistent reading. `dead_below` is that of third-party code.
    Learning rate and first biases (0 here) are not known.

    Needs: an autoencoder, since the dictionary is tied; decoder rows of norm 1, as
    training keeps them unless told otherwise; in loops of one's own the step's number.
    """
    pre = inputs.pre
    value = pre - inputs.encoder.b_enc if form == "jump" else pre
    active = jnp.where(pre > 0, value, 0)
    if train:
        is_new = jnp.asarray(inputs.step, jnp.int32) != state["last_step"]
        seen = observed(state, inputs, is_new)
        targets = targets_of(state["group"] / max(groups - 1, 1), highest, lowest)
        turned = adapted(seen, targets, groups, lower, lift, dead_below)
        due = is_new & (seen["steps"] >= every)
        state = jax.tree.map(lambda new, old: jnp.where(due, new, old), turned, seen)
    return Encoded(active, state, {})


def observed(state: State, inputs: Inputs, is_new: Array) -> State:
    """The statistics with the valid rows of this batch in them."""
    pre, x = map(jax.lax.stop_gradient, (inputs.pre, inputs.x_centred))
    valid = jnp.ones(len(pre), bool) if inputs.mask is None else inputs.mask
    on = valid[:, None] & (pre > 0)
    norms = jnp.where(valid, jnp.linalg.norm(x, axis=1), 0)
    # A sum of floats is eight times as fast as one of booleans, and exact here.
    fired = jnp.where(on, 1.0, 0.0).sum(0).astype(jnp.int32)
    found = {
        "steps": state["steps"] + is_new,
        "last_step": jnp.asarray(inputs.step),
        "rows": state["rows"].at[0].add(valid.sum(dtype=jnp.int32)),
        "norms": state["norms"].at[0].add(norms.sum()),
        "fired": state["fired"].at[:, 0].add(fired),
        "largest": state["largest"].at[:, 0].max(jnp.where(on, pre, 0).max(0)),
    }
    return {name: found.get(name, a).astype(a.dtype) for name, a in state.items()}


def targets_of(depth: Array, highest: float | Array, lowest: float) -> Array:
    """The target frequency of features, from the first group (0) to the last (1)."""
    return highest ** (1 - depth) * lowest**depth


def adapted(
    state: State,
    targets: Array,
    groups: int,
    lower: float,
    lift: float,
    dead_below: float,
) -> State:
    """New biases from the statistics of the buffer, where a new window begins.

    With p_m the share of rows with `pre_m > 0`, r_m = max(0, largest pre_m) and r_k the
    mean of those r_m of group k that are above 0: where p_m is above its target
    `bias_m = max(bias_m - lower * r_m, -1)`; where it is below `dead_below`
    `bias_m = min(bias_m + lift * r_k, 0)`; else as it was.
    """
    rows, norms = jnp.maximum(state["rows"].sum(), 1), state["norms"].sum()
    frequency = state["fired"].sum(1) / rows
    unit = jnp.where(norms > 0, norms / rows, state["unit"])
    reach = state["largest"].max(1) / unit
    in_group = state["group"][:, None] == jnp.arange(groups)
    counted = in_group & (reach > 0)[:, None]
    means = jnp.where(counted, reach[:, None], 0).sum(0)
    means = means / jnp.maximum(counted.sum(0), 1)
    bias = state["bias"]
    lowered = jnp.maximum(bias - lower * reach, -1)
    lifted = jnp.minimum(bias + lift * means[state["group"]], 0)
    kept = jnp.where(frequency < dead_below, lifted, bias)
    bias = jnp.where(frequency > targets, lowered, kept)
    buffer = {
        name: jnp.roll(state[name], 1, -1).at[..., 0].set(0)
        for name in ("rows", "norms", "fired", "largest")
    }
    steps = jnp.zeros_like(state["steps"])
    return {**state, **buffer, "bias": bias, "unit": unit, "steps": steps}


def init(
    key: Array, params: Params, *, groups: int = 10, windows: int = 3
) -> tuple[Params, State]:
    """Scales of 1 and biases of 0; features fall into groups of one size."""
    W_dec, b_dec = params["W_dec"], params["b_dec"]
    zeros = jnp.zeros_like(params["b_enc"])
    n_features, dtype = len(zeros), zeros.dtype
    state = {
        "bias": zeros,
        "unit": jnp.ones((), dtype),
        "group": jnp.arange(n_features, dtype=jnp.int32) * groups // n_features,
        "fired": jnp.zeros((n_features, windows), jnp.int32),
        "largest": jnp.zeros((n_features, windows), dtype),
        "rows": jnp.zeros(windows, jnp.int32),
        "norms": jnp.zeros(windows, dtype),
        "steps": jnp.zeros((), jnp.int32),
        "last_step": jnp.full((), -1, jnp.int32),
    }
    return {"W_dec": W_dec, "b_dec": b_dec, "scale": jnp.ones_like(zeros)}, state


def weights(params: Params, state: State) -> Weights:
    """Both matrices are the dictionary; the decoder has the scales in it."""
    W = params["W_dec"]
    b_enc = state["unit"] * state["bias"]
    return Weights(W, b_enc, params["scale"][:, None] * W, params["b_dec"])


def export(params: Params, state: State, *, form: Form) -> Counterpart:
    """With the biases of now; in the jump form they only decide, as those of a gate."""
    if form != "jump":
        return Counterpart("positive")
    zeros = jnp.zeros_like(state["bias"])
    return Counterpart("gate", {"r_mag": zeros, "b_mag": zeros})


def faults(
    n_features: int,
    *,
    highest: float,
    lowest: float,
    groups: int,
    every: int,
    windows: int,
) -> Iterable[str]:
    """Frequencies must fall, groups have features, and the buffer hold something."""
    if not 1 <= groups <= n_features:
        yield f"groups={groups} must be at least 1 and at most {n_features=}."
    if every == 0:
        yield "every=0 never adapts; 1: after each step."
    if windows < 1:
        yield f"windows={windows} keeps no rows; 1: those since the last time."
    if groups > 1 and not 0 < lowest <= highest:
        yield f"lowest={lowest} must be above 0 and at most highest={highest}."


register(
    Rule(
        name="group_bias",
        paper="Chen et al. 2025 (arXiv:2506.14002)",
        decides="sign under a bias that is adapted to how often a feature fires",
        encode=group_bias,
        example={"highest": 0.2, "lowest": 0.05, "groups": 4, "every": 1},
        knob="highest",
        init=init,
        weights=weights,
        export=export,
        fold=None,
        faults=faults,
        needs=frozenset({"autoencoder"}),
        centres=False,
        aux_k=False,
    )
)
