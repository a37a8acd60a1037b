"""Gradients of a batch in pieces: the same step, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import RULES, SAE, AuxK, adam, init_state, make_step
from sae_jax.activations.in_memory import InMemory
from sae_jax.binding import bind
from sae_jax.run.loop import Loop
from sae_jax.run.members import Member
from sae_jax.training import sums
from sae_jax.training.recipe import Recipe
from tests import contract
from tests.contract import KEY, B, D, F, close

DRAWING = [n for n in RULES if "key" in RULES[n].needs]
COUPLED = [n for n in RULES if RULES[n].couples_batch and n not in DRAWING]
ALONE = [n for n in RULES if n not in {*DRAWING, *COUPLED}]
FORGETFUL = [n for n in ALONE if not SAE(D, F, n).shapes().state]
HALF_VALID = jnp.arange(B) < 13  # shares of pieces differ


@pytest.fixture(autouse=True)
def some_features_at_a_time(monkeypatch):
    """Sums of gradients grow in two parts and a rest."""
    monkeypatch.setattr(sums, "AT_ONCE", 24)


def batch(mask=None):
    x = contract.rows(5)
    whole = {"x": x, "grad": contract.gradient_of_model(x)}
    return whole if mask is None else {**whole, "mask": mask}


def stepped(name, accumulate, mask=None, aux=None, steps=3, **options):
    sae = SAE(D, F, rule=bind(RULES[name], RULES[name].example))
    optimiser = adam(1e-2)
    state = init_state(sae, optimiser, KEY)
    step = make_step(sae, optimiser, aux=aux, accumulate=accumulate, **options)
    for _ in range(steps):
        state, metrics = step(state, batch(mask))
    return state, metrics


@functools.cache
def whole(name, masked):
    return stepped(name, 1, HALF_VALID if masked else None)


@pytest.mark.parametrize(("n", "mask"), [(B, None), (3, HALF_VALID)])
@pytest.mark.parametrize("name", FORGETFUL)
def test_pieces_give_the_step_of_the_whole_batch(name, mask, n):
    state, metrics = whole(name, masked=mask is not None)
    other, others = stepped(name, n, mask)
    assert metrics.keys() == others.keys()
    for key, value in metrics.items():
        close(value, others[key], 1e-4)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), state.variables, other.variables)
    np.testing.assert_array_equal(state.steps_idle, other.steps_idle)


@pytest.mark.parametrize("name", COUPLED)
def test_to_a_rule_of_batches_each_piece_is_one(name):
    """Gradients piece by piece in a plain loop, which hands the rule's memory on."""
    bound, n = bind(RULES[name], RULES[name].example), 3
    sae, variables = contract.build(bound)
    optimiser = adam(1e-2, clip=None)
    state = init_state(sae, optimiser, KEY, variables=variables)
    total, memory, errors = None, variables.state, []
    for i in range(n):
        x = contract.rows(5)[i::n]

        def mse(params, x=x, memory=memory):
            given = variables._replace(params=params, state=memory)
            out = contract.forward(sae, given, x, train=True)
            scored = zip(out.coefficients, out.x_hats, strict=True)
            error = sum(c * jnp.square(h - out.target).mean() for c, h in scored)
            return error, out.state

        (error, memory), found = jax.value_and_grad(mse, has_aux=True)(variables.params)
        errors.append(error)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    step = make_step(sae, optimiser, aux=None, decoder_norm="free", accumulate=n)
    state, metrics = step(state, batch())
    close(metrics["loss"], np.mean(errors))
    squares = sum(float(jnp.square(g / n).sum()) for g in jax.tree.leaves(total))
    close(metrics["grad_norm"], np.sqrt(squares), 1e-4)
    jax.tree.map(close, state.variables.state, memory)


@pytest.mark.parametrize("name", DRAWING)
def test_each_piece_draws_random_numbers_of_its_own(name):
    """Two pieces of the same rows: with the same draws they would do the same."""
    sae = SAE(D, F, rule=bind(RULES[name], RULES[name].example))
    optimiser = adam(1e-2)
    twice = {"x": jnp.repeat(contract.rows(5), 2, axis=0)}
    found = []
    for rows, n in ((batch(), 1), (twice, 2)):
        step = make_step(sae, optimiser, accumulate=n)
        found.append(step(init_state(sae, optimiser, KEY), rows)[1]["loss"])
    assert contract.differ(*found)


@pytest.mark.parametrize("n", [2, 4])
def test_dead_features_learn_in_every_piece(n):
    """All rows fire the same feature: the others are dead in each piece alike."""
    sae = SAE(D, F, rule="topk(k=1)")
    alike = {"x": jnp.tile(contract.rows(5)[:1], (B, 1))}
    found = []
    for pieces in (1, n):
        optimiser = adam(1e-2)
        step = make_step(sae, optimiser, aux=AuxK(dead_after=1), accumulate=pieces)
        found.append(step(init_state(sae, optimiser, KEY), alike))
    (state, metrics), (other, others) = found
    assert metrics["loss_aux"] > 0
    close(metrics["loss_aux"], others["loss_aux"], 1e-4)
    jax.tree.map(close, state.variables.params, other.variables.params)


def test_pieces_take_less_memory():
    sae = SAE(32, 4096, rule="relu")
    optimiser = adam(1e-3)
    state = jax.eval_shape(lambda: init_state(sae, optimiser, KEY))
    x = jax.ShapeDtypeStruct((1024, 32), jnp.float32)

    def temporary(n):
        step = make_step(sae, optimiser, accumulate=n).lower(state, {"x": x})
        return step.compile().memory_analysis().temp_size_in_bytes

    codes = 4 * 1024 * 4096
    assert temporary(1) > 2 * codes
    assert temporary(8) < codes


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "accumulate=0 takes no rows"), (1.5, "accumulate=1.5 must be an integer")],
)
def test_a_number_of_pieces_that_cannot_be_is_refused(n, said, as_users):
    with pytest.raises(ValueError, match=said):
        make_step(SAE(D, F, "relu"), adam(1e-3), accumulate=n)
    with pytest.raises(ValueError, match=said):
        Recipe(accumulate=n)


def test_pieces_of_two_sizes_are_refused_before_any_activation_is_read():
    said = "accumulate=5 must divide the rows of a batch, 24: pieces are of one size"
    with pytest.raises(ValueError, match=said):
        stepped("relu", 5)
    stream = InMemory({"x": np.zeros((48, D), np.float32)}, batch=B)
    with pytest.raises(ValueError, match=said):
        Loop({"one": Member(SAE(D, F, "relu"), "x")}, stream, Recipe(accumulate=5))
