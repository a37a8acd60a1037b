"""For each check of `contract.py`, a rule that breaks it and passes every other.

A check that nothing can fail asserts nothing; `test_saboteurs.py` holds the pairs.
Most are TopK with one thing wrong.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sae_jax import Encoded, Penalty, Rule, Sparse, over_batch, select
from sae_jax.binding import bind
from tests import contract

SABOTEURS = {}

rule_like = functools.partial(
    Rule,
    paper="none",
    decides="wrongly",
    example={"k": 4},
    knob="k",
    budget="k",
    aux_k=False,
)


def breaks(check, **record):
    """Pairs the function below with the check that it must fail."""

    def add(encode):
        rule = rule_like(encode.__name__, encode=encode, **record)
        SABOTEURS[check] = bind(rule, rule.example)
        return encode

    return add


def topk(inputs, k):
    """Plain TopK, dense, for a k that may be traced."""
    chosen = select.rows(inputs.pre, k, count_max=contract.F)
    return select.keep(inputs.encoder, chosen)


def valid(inputs):
    n = inputs.pre.shape[0]
    return jnp.ones(n, bool) if inputs.mask is None else inputs.mask


@breaks(contract.codes_are_well_formed, budget=None)
def index_twice(inputs, params, state, *, k: int = 2):
    values, indices = jax.lax.top_k(inputs.pre, 2)
    values = jnp.where(valid(inputs)[:, None], jax.nn.relu(values), 0) / 2
    twice = Sparse(jnp.tile(values, 2), jnp.tile(indices, 2), contract.F)
    return Encoded(twice, state, {})


@breaks(contract.codes_are_signed_only_if_declared)
def signed(inputs, params, state, *, k: int | Array = 4):
    chosen = select.rows(jnp.abs(inputs.pre), k, count_max=contract.F)
    return Encoded(jnp.where(chosen, inputs.pre, 0), state, {})


@breaks(contract.budget_holds_with_ties)
def keeps_ties(inputs, params, state, *, k: int | Array = 4):
    ordered = jnp.sort(inputs.pre, axis=1)
    least = jnp.take(ordered, jnp.asarray(contract.F - k, int), axis=1)
    active = jnp.where(inputs.pre >= least[:, None], jax.nn.relu(inputs.pre), 0)
    return Encoded(active, state, {})


@breaks(contract.rows_without_positive_values_stay_finite)
def divides_by_norm(inputs, params, state, *, k: int | Array = 4):
    active = topk(inputs, k)
    norm = jnp.linalg.norm(active, axis=1, keepdims=True)
    return Encoded(active * (norm / norm), state, {})


@breaks(contract.order_of_rows_is_irrelevant, couples_batch=True)
def favours_the_first_row(inputs, params, state, *, train: bool, k: int | Array = 4):
    first = jnp.arange(inputs.pre.shape[0]) == 0
    mean = jnp.where(valid(inputs)[:, None], inputs.pre, 0).sum(0) / valid(inputs).sum()
    score = inputs.pre - train * (mean + 3 * first[:, None] * jnp.sign(inputs.pre))
    chosen = select.rows(score, k, count_max=contract.F)
    return Encoded(select.keep(inputs.encoder, chosen), state, {})


@breaks(contract.rows_are_coupled_in_training_only_if_declared)
def couples_in_secret(inputs, params, state, *, train: bool, k: int | Array = 4):
    mean = jnp.where(valid(inputs)[:, None], inputs.pre, 0).sum(0) / valid(inputs).sum()
    chosen = select.rows(inputs.pre - train * mean, k, count_max=contract.F)
    return Encoded(select.keep(inputs.encoder, chosen), state, {})


@breaks(contract.declared_coupling_is_real, couples_batch=True)
def claims_coupling(inputs, params, state, *, k: int | Array = 4):
    return Encoded(topk(inputs, k), state, {})


@breaks(
    contract.evaluation_ignores_neighbours,
    init=over_batch.threshold_init,
    couples_batch=True,
)
def no_threshold(inputs, params, state, *, train: bool, k: float | Array = 4.0):
    encoded = over_batch.encode(inputs, params, state, train=True, k=k, k_max=64.0)
    return encoded if train else encoded._replace(state=state)


def counter(key, params):
    return params, {"batches": jnp.zeros((), jnp.int32)}


@breaks(contract.evaluation_leaves_the_state_alone, init=counter)
def counts_always(inputs, params, state, *, k: int | Array = 4):
    return Encoded(topk(inputs, k), {"batches": state["batches"] + 1}, {})


@breaks(contract.randomness_is_declared_and_repeatable)
def secret_noise(inputs, params, state, *, train: bool, k: int | Array = 4):
    strength = 1.0
    if train and inputs.key is not None:  # one number for all: no row stands out
        strength = 1 + 0.1 * jax.random.uniform(inputs.key)
    return Encoded(topk(inputs, k) * strength, state, {})


@breaks(
    contract.gradients_of_the_model_decide_if_needed,
    needs=frozenset({"grad_x"}),
    without_gradient="as with them",
)
def claims_gradients(inputs, params, state, *, k: int | Array = 4):
    return Encoded(topk(inputs, k), state, {})


@breaks(contract.every_parameter_learns)
def deaf_encoder(inputs, params, state, *, k: int | Array = 4):
    return Encoded(jax.lax.stop_gradient(topk(inputs, k)), state, {})


@breaks(contract.jit_changes_nothing)
def knows_it_is_traced(inputs, params, state, *, k: int | Array = 4):
    compiled = isinstance(inputs.pre, jax.core.Tracer)
    return Encoded(topk(inputs, k) * (1.25 if compiled else 1.0), state, {})


@breaks(contract.traced_knobs_and_ensembles_equal_solo_runs)
def other_knob_when_traced(inputs, params, state, *, k: int | Array = 4):
    return Encoded(topk(inputs, k if isinstance(k, int) else k / 2), state, {})


@breaks(contract.bfloat16_is_kept_to_the_products)
def narrow_penalty(inputs, params, state, *, k: int | Array = 4):
    active = topk(inputs, k)
    price = active.sum(1).astype(inputs.encoder.dtype)
    return Encoded(active, state, {"l1": Penalty(1e-3, price)})


def mean_norm(key, params):
    return params, {"norm": jnp.zeros(())}


@breaks(contract.masked_rows_do_not_count, init=mean_norm)
def counts_masked_rows(inputs, params, state, *, train: bool, k: int | Array = 4):
    if train:
        state = {"norm": jnp.linalg.norm(inputs.x, axis=1).mean()}
    return Encoded(topk(inputs, k), state, {})


@breaks(contract.features_have_no_order)
def favours_late_features(inputs, params, state, *, k: int | Array = 4):
    score = inputs.pre * jnp.linspace(1, 2, contract.F)
    chosen = select.rows(score, k, count_max=contract.F)
    return Encoded(select.keep(inputs.encoder, chosen), state, {})


@breaks(contract.constant_scale_folds_into_weights)
def reads_absolute_norms(inputs, params, state, *, k: int | Array = 4):
    strong = jnp.linalg.norm(inputs.x, axis=1, keepdims=True) > 5
    return Encoded(topk(inputs, k) * jnp.where(strong, 1.2, 1), state, {})


@breaks(contract.transcoders_work_unless_excluded)
def assumes_one_width(inputs, params, state, *, k: int | Array = 4):
    active = topk(inputs, k)
    error = jnp.square(inputs.x - active @ inputs.weights.W_dec).mean(1)
    return Encoded(active, state, {"again": Penalty(0.1, error)})


@breaks(contract.training_compiles_once_and_keeps_types, init=mean_norm)
def changes_type(inputs, params, state, *, train: bool, k: int | Array = 4):
    if train:
        norms = jnp.linalg.norm(inputs.x, axis=1)
        mean = jnp.where(valid(inputs), norms, 0).sum() / valid(inputs).sum()
        state = {"norm": mean[None] * jnp.ones(2)}
    return Encoded(topk(inputs, k), state, {})


@breaks(contract.training_lowers_the_error)
def rewards_size(inputs, params, state, *, k: int | Array = 4):
    active = topk(inputs, k)
    return Encoded(active, state, {"l1": Penalty(-10.0, active.sum(1))})


@breaks(contract.knob_moves_sparsity_as_declared, knob_raises_l0=False)
def wrong_direction(inputs, params, state, *, k: int | Array = 4):
    return Encoded(topk(inputs, k), state, {})
