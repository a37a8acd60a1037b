"""Mutual Choice: features and rows choose each other, within one budget for the batch.

Ayonrinde 2024, arXiv:2411.02124: with affinities `A = relu(pre)` and a 0/1 matrix S of
which only the sum is limited, `codes = A * S`, S marks the M = k * B largest affinities
of the batch. Within one batch that is BatchTopK, and so it is in `over_batch`, with its
running threshold for single rows.

What is different is that the rule follows how often each feature fires, and that the
auxiliary loss for dead features (AuxK) also takes in underused ones ("aux_zipf"): with
n_i the running count of feature i and n*_i what Zipf's law of the counts expects at its
rank, or their mean if that is less (`zipf`), those with `n_i < n*_i / 10`. Training can
go on as `feature_choice`, with the budgets that these counts suggest.

Differs: only the paper's opening could be read, where neither the formula of the
auxiliary loss stands nor the constants of the law. Underused as above (0: dead ones
alone), alpha = 1, q = 0 and counts that fade by 0.99 a batch are choices made here.
"""

from jaxtyping import Array

from sae_jax import over_batch, zipf
from sae_jax.contract import (
    Encoded,
    Inputs,
    Params,
    Rule,
    State,
    budget_faults,
    register,
)


def mutual_choice(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    train: bool,
    k: float | Array = 32.0,
    k_max: float,
    threshold_decay: float = 0.99,
    firings_decay: float = 0.99,
) -> Encoded:
    """The k * B largest affinities of the batch, whose features are counted."""
    encoded = over_batch.encode(
        inputs,
        params,
        state,
        train=train,
        k=k,
        k_max=k_max,
        threshold_decay=threshold_decay,
    )
    if not train:
        return encoded
    firings = zipf.firings_update(state, encoded.codes, inputs.mask, firings_decay)
    return encoded._replace(state={**encoded.state, **firings})


def init(key: Array, params: Params) -> tuple[Params, State]:
    """A threshold for all features, and a count of each."""
    params, state = over_batch.threshold_init(key, params)
    return params, {**state, **zipf.firings_init(params)}


register(
    Rule(
        name="mutual_choice",
        paper="Ayonrinde 2024 (arXiv:2411.02124)",
        decides="the k * B largest pre-activations of the batch; later a threshold",
        export=over_batch.export,
        encode=mutual_choice,
        init=init,
        underused=zipf.underused,
        example={"k": 4.0},
        knob="k",
        budget="k",
        faults=budget_faults,
        couples_batch=True,
    )
)
