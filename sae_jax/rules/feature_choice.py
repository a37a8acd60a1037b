"""Feature Choice: each feature chooses its best rows of the batch.

Ayonrinde 2024, arXiv:2411.02124: with affinities `A = relu(pre)`, `codes = A * S`;
column i of the 0/1 matrix S marks the m_i largest affinities of feature i among the
rows, and the m_i sum to M = k * B. So no feature is dead that is positive anywhere.

Here `m_i = max(1, round(c * w_i))`, with the share w_i that Zipf's law gives to the
feature's rank in how often it fired (`zipf`), and c such that they sum to M; no m_i is
above the number of rows. alpha = 0 gives all features alike. The sum is within F of M,
by rounding and because each feature gets a row at least: with F > k * B it is at least
F, so k does not bound the mean L0.

Ranks are by `firings`, which follows how often features do fire; since that is what the
budgets say, ranks last, except of features that are not positive on m_i rows. Training
that starts from an SAE of `mutual_choice` (`sae_jax.train(start=...)`) starts with the
ranks that features have there ("progressive"). Ranks of a fresh SAE are by index.

For single rows codes are `pre` above a threshold of each feature: the running mean of
its smallest kept value, as in `over_batch`.

Differs: only the paper's opening could be read. alpha and q of its law are not known,
nor are details of the change from Mutual to Feature Choice, nor whether it encodes
single rows at all: budgets and thresholds are choices made here.
"""

from jaxtyping import Array

from sae_jax import codes, over_batch, select, zipf
from sae_jax.contract import (
    Encoded,
    Inputs,
    Params,
    Rule,
    State,
    budget_faults,
    register,
)


def feature_choice(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    train: bool,
    k: float | Array = 32.0,
    k_max: float,
    alpha: float = 1.0,
    q: float = 0.0,
    threshold_decay: float = 0.99,
    firings_decay: float = 0.99,
) -> Encoded:
    """The best rows of each feature, or those above its running threshold.

    Masked rows take no share of the budget.
    """
    if not train:
        return Encoded(over_batch.threshold_codes(inputs, state), state, {})
    scores, n_valid = over_batch.valid_scores(inputs)
    n_rows, n_features = scores.shape
    by_rank = zipf.budgets(zipf.shares(n_features, alpha, q), k * n_valid, n_valid)
    counts = by_rank[zipf.ranks(state["firings"])]
    count_max = int(k_max * n_rows) + n_features + 1
    active = select.keep(
        inputs.encoder, select.columns(scores, counts, count_max=count_max)
    )
    smallest = codes.smallest_of_each(active)
    threshold = over_batch.threshold_update(state, smallest, threshold_decay)
    firings = zipf.firings_update(state, active, inputs.mask, firings_decay)
    return Encoded(active, {**threshold, **firings}, {})


def init(key: Array, params: Params) -> tuple[Params, State]:
    """A threshold and a count of each feature."""
    params, state = over_batch.threshold_init(key, params, of_each=True)
    return params, {**state, **zipf.firings_init(params)}


register(
    Rule(
        name="feature_choice",
        paper="Ayonrinde 2024 (arXiv:2411.02124)",
        decides="the best rows of each feature; later a threshold of each feature",
        export=over_batch.export,
        encode=feature_choice,
        init=init,
        underused=zipf.underused,
        example={"k": 4.0},
        knob="k",
        faults=budget_faults,
        couples_batch=True,
    )
)
