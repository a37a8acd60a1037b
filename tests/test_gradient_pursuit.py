"""Gradient pursuit, against the loop that its docstring describes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE, to_dense
from sae_jax.analysis.gradient_pursuit import pursue, reconstruct
from tests import analysis_oracles as oracles


def dictionary(n, width, seed=0, mean=0.0):
    atoms = np.random.default_rng(seed).normal(size=(n, width)) + mean
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def pursued(x, atoms, budgets, budget_max=None):
    budget = jnp.asarray(budgets)
    top = int(max(budgets)) if budget_max is None else budget_max
    found = pursue(jnp.asarray(x), jnp.asarray(atoms), budget, budget_max=top)
    return np.asarray(to_dense(found))


@pytest.mark.usefixtures("x64")
def test_codes_are_those_of_the_loop_row_by_row():
    """With features so alike some drop out again, and others are chosen twice."""
    rng = np.random.default_rng(1)
    atoms, x = dictionary(30, 6, mean=1), rng.normal(size=(40, 6))
    x[7] = 0  # a step of 0 / 0
    budgets = rng.integers(0, 12, 40)
    slow = oracles.gradient_pursuit(x, atoms, budgets)
    np.testing.assert_allclose(pursued(x, atoms, budgets, 12), slow, atol=1e-10)
    assert (slow >= 0).all()
    l0 = (slow != 0).sum(1)
    assert (l0 <= budgets).all()
    assert (l0 < budgets).sum() > 5
    assert not slow[budgets == 0].any()


@pytest.mark.usefixtures("x64")
def test_a_row_stops_by_itself_whatever_others_do_and_whatever_the_ceiling():
    rng = np.random.default_rng(2)
    atoms, x = dictionary(40, 12), rng.normal(size=(5, 12))
    budgets = [3, 0, 9, 1, 5]
    together = pursued(x, atoms, budgets, 16)
    for i, budget in enumerate(budgets):
        alone = pursued(x[i : i + 1], atoms, [budget], 9)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-12)


def test_planted_codes_are_found_where_plain_pursuit_and_an_encoder_do_worse():
    """The figures of the check: .029 and all found; plain .071; tied encoder .81."""
    rng, n = np.random.default_rng(0), 1000
    atoms = dictionary(256, 64)
    codes = np.zeros((n, 256))
    for row in codes:
        row[rng.choice(256, 4, replace=False)] = rng.uniform(0.5, 1.5, 4)
    x = codes @ atoms

    def error(found):
        return np.square(x - found @ atoms).sum(1).mean()

    found = pursued(x.astype(np.float32), atoms.astype(np.float32), [4] * n)
    recovered = ((found != 0) & (codes != 0)).sum() / (codes != 0).sum()
    plain = oracles.matching_pursuit(x, atoms, 4)
    pre = x @ atoms.T
    tied = np.where(pre >= np.sort(pre, 1)[:, [-4]], np.maximum(pre, 0), 0)
    assert error(found) <= 0.05
    assert recovered >= 0.95
    assert 0.05 < error(plain) < 0.1
    assert 0.6 < error(tied) < 1
    assert 4 < error(0 * codes) < 4.7


def test_no_array_has_steps_times_rows_times_features():
    rows, features, width, steps = 64, 4096, 8, 32
    shapes = (rows, width), (features, width)
    x, atoms = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    budget = jax.ShapeDtypeStruct((rows,), jnp.int32)
    compiled = pursue.lower(x, atoms, budget, budget_max=steps).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 8 * rows * features * 4 < steps * rows * features * 4


def uneven(treatment):
    """An SAE with a bias and decoder rows of many lengths, one of them of none."""
    rng = np.random.default_rng(3)
    W_dec = rng.normal(size=(24, 8)) * rng.uniform(0.1, 3, (24, 1))
    W_dec[5] = 0
    sae = SAE(8, 24, rule="topk(k=3)", treatment=treatment)
    variables = sae.init(jax.random.key(0), sample=5 * jnp.ones((4, 8)))
    given = {"W_dec": W_dec, "b_dec": 0.3 * rng.normal(size=8)}
    params = {name: jnp.asarray(array, jnp.float32) for name, array in given.items()}
    return sae, variables._replace(params={**variables.params, **params}), W_dec


@pytest.mark.parametrize("treatment", ["none", "scale", "standardise"])
def test_an_saes_dictionary_is_searched_in_its_own_space(treatment, monkeypatch):
    """In pieces of five rows; rows that do not count are left alone."""
    monkeypatch.setattr("sae_jax.analysis.gradient_pursuit.AT_ONCE", 5 * 4 * 8)
    sae, variables, W_dec = uneven(treatment)
    x = np.random.default_rng(4).normal(size=(13, 8)) + 0.5
    use = np.arange(13) != 6
    rows = jnp.asarray(x, jnp.float32)
    budgets = (np.asarray(to_dense(sae.encode(variables, rows))) != 0).sum(1)
    factor, shift = np.ones((13, 1)), np.zeros((13, 1))
    if treatment == "scale":
        factor /= float(variables.constants["scale_in"])
    if treatment == "standardise":
        shift, factor = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    lengths = np.linalg.norm(W_dec, axis=1, keepdims=True)
    atoms, b_dec = W_dec / np.where(lengths, lengths, 1), variables.params["b_dec"]
    codes = oracles.gradient_pursuit((x - shift) / factor - b_dec, atoms, budgets)
    expected = (codes @ atoms + b_dec) * factor + shift
    found = reconstruct(sae, variables, rows, jnp.asarray(use))
    # float32; standardising adds 1e-5 to the spread.
    np.testing.assert_allclose(found[use], expected[use], atol=1e-4)


def test_a_transcoder_is_refused():
    sae = SAE(8, 16, rule="relu", d_out=8)
    with pytest.raises(ValueError, match="is a transcoder"):
        reconstruct(sae, sae.init(jax.random.key(0)), jnp.ones((2, 8)), jnp.ones(2) > 0)
