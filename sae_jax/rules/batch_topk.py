"""BatchTopK: a fixed number of active features per batch, shared out among its rows.

Bussmann et al. 2024, arXiv:2412.06410: `codes = relu(pre)` on the k * B largest entries
of the whole batch, 0 elsewhere. For evaluation `codes = pre` where `pre > threshold`,
the expected smallest kept value. Both are in `over_batch`, for every rule that shares
its budget over the batch.

Differs: the running threshold is a bias-corrected moving average (decay 0.99, chosen
untested), where dictionary_learning starts one after 1,000 steps, SAELens starts one
at 0, and the authors' first code has none and evaluates on whole batches.
"""

from sae_jax import over_batch
from sae_jax.contract import Rule, budget_faults, register

register(
    Rule(
        name="batch_topk",
        paper="Bussmann et al. 2024 (arXiv:2412.06410)",
        decides="the k * B largest pre-activations of the batch; later a threshold",
        encode=over_batch.encode,
        init=over_batch.threshold_init,
        export=over_batch.export,
        example={"k": 4.0},
        knob="k",
        budget="k",
        faults=budget_faults,
        couples_batch=True,
    )
)
