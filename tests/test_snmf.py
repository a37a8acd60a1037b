"""Neuron groups: the factorisation by an oracle, planted groups, levels, concepts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from experiments._planted_groups import FOUND, matched, plant
from sae_jax.analysis import concepts
from sae_jax.analysis.snmf import factors, levels
from sae_jax.analysis.snmf.factors import encode, factorise, kept, step, unexplained
from sae_jax.analysis.snmf.starts import STARTS
from sae_jax.evaluation import steering
from tests import snmf_oracle as oracle
from tests.toys import toy_lm

# float32 beside float64 after so many steps, of numbers of size 1.
CLOSE = 2e-4


def rows(n=40, width=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def start(n=40, k=3, seed=1):
    return np.random.default_rng(seed).uniform(size=(n, k)).astype(np.float32)


@pytest.mark.parametrize("n_kept", [12, 4])
def test_steps_are_those_of_the_paper(n_kept):
    x, codes = rows(), jnp.asarray(start())
    G = start().astype(np.float64)
    for _ in range(5):
        F, G = oracle.step(x.T.astype(np.float64), G, n_kept)
        codes, groups, less = step(jnp.asarray(x), codes, n_kept)
        np.testing.assert_allclose(groups, F.T, atol=CLOSE)
        np.testing.assert_allclose(codes, G, atol=CLOSE)
        assert ((groups != 0).sum(1) == n_kept).all()
        error = 1 + less / (x**2).sum()
        np.testing.assert_allclose(error, oracle.error(x.T, F, G), atol=CLOSE)


@pytest.mark.parametrize("patience", [100, 3])
def test_the_best_step_is_kept_and_waited_on(patience):
    """With few neurons the error goes up and down."""
    x = rows(n=60, width=10, seed=20)
    codes = STARTS["random"](jax.random.key(0), jnp.asarray(x), 4)
    G = np.asarray(codes, np.float64)
    F, G, errors = oracle.factorise(x.T.astype(np.float64), G, 2, 30, patience)
    found = factorise(jnp.asarray(x), 4, share=0.2, steps=30, patience=patience)
    made = np.asarray(found.errors)
    assert np.isfinite(made).sum() == len(errors)
    assert np.isnan(made[len(errors) :]).all()
    np.testing.assert_allclose(made[: len(errors)], errors, atol=CLOSE)
    assert np.argmin(errors) < len(errors) - 1
    np.testing.assert_allclose(found.groups, F.T, atol=10 * CLOSE)
    np.testing.assert_allclose(found.codes, G, atol=10 * CLOSE)
    lowest = unexplained(jnp.asarray(x), found.codes, found.groups)
    np.testing.assert_allclose(lowest, np.nanmin(made), atol=CLOSE)


@pytest.mark.parametrize("name", STARTS)
def test_without_winners_the_error_never_rises_and_codes_are_not_negative(name):
    x = jnp.asarray(plant(0, rows=80, neurons=30, k=4).rows + 0.05 * rows(80, 30))
    found = factorise(x, 4, share=1.0, steps=60, start=name)
    assert np.diff(found.errors).max() < 1e-6
    assert float(found.errors[-1]) < 0.2
    assert float(found.codes.min()) >= 0
    again = factorise(x, 4, share=1.0, steps=60, start=name)
    np.testing.assert_array_equal(found.groups, again.groups)


@pytest.mark.slow
def test_planted_groups_are_found_with_winners_and_not_without():
    """Sparsity, not fit, identifies them: the error without is the lower one."""
    whole, cosines = 0, {0.02: [], 1.0: []}
    for seed in range(4):
        planted = plant(seed)
        x = jnp.asarray(planted.rows)
        error = {}
        for share, held in cosines.items():
            found = factorise(x, 8, share=share, steps=500, seed=seed)
            error[share] = unexplained(x, found.codes, found.groups)
            held.append(matched(planted.groups, found.groups))
            if share < 1:
                assert ((found.groups != 0).sum(1) == 4).all()
        n_found = (cosines[0.02][-1] > FOUND).sum()
        whole += error[0.02] <= 0.05 and n_found >= 6
        assert error[1.0] < min(0.005, error[0.02])
    assert whole >= 3
    assert np.mean(cosines[0.02]) > 0.8
    assert np.mean(cosines[1.0]) < 0.7


def test_one_group_of_rows_of_rank_one_is_found_exactly():
    rng = np.random.default_rng(0)
    group = np.zeros(50)
    group[[3, 7, 11]] = 1.0, -2.0, 0.5
    x = jnp.asarray(np.outer(rng.uniform(0.1, 1, 30), group), jnp.float32)
    found = factorise(x, 1, share=0.06, steps=20)
    assert matched(group[None], found.groups)[0] > 1 - 1e-6
    assert unexplained(x, found.codes, found.groups) < 1e-9


def test_winners_are_chosen_before_groups_get_their_size():
    """And a code that is 0 stays so, and a row of zeros has no code to speak of."""
    x = jnp.asarray(np.concatenate([rows(20), np.zeros((1, 12))]), jnp.float32)
    codes = jnp.asarray(np.concatenate([start(20), np.zeros((1, 3))]), jnp.float32)
    codes, groups, _ = step(x, codes.at[4, 1].set(0), 5)
    assert codes[4, 1] == 0
    assert (codes[20] == 0).all()
    assert np.isfinite(np.asarray(groups)).all()
    none, groups, _ = step(x, codes.at[:, 1].set(0), 5)  # a group that died
    assert np.isfinite(np.asarray(none)).all()
    assert (np.asarray(groups[1]) == 0).all()
    assert [kept(0.02, 200), kept(0.07, 100), kept(0.001, 100)] == [4, 7, 1]


def test_codes_of_new_rows_for_known_groups():
    """Each row alone, and near the codes that made it."""
    planted = plant(3, rows=50, neurons=40, k=4)
    groups = jnp.asarray(planted.groups, jnp.float32)
    codes = encode(jnp.asarray(planted.rows), groups, steps=400)
    assert float(codes.min()) >= 0
    assert unexplained(jnp.asarray(planted.rows), codes, groups) < 1e-4
    alone = encode(jnp.asarray(planted.rows[7:8]), groups, steps=400)
    np.testing.assert_allclose(alone[0], codes[7], atol=1e-4)


def test_levels_are_factored_and_tuned_as_one_product():
    x = jnp.asarray(plant(1, rows=60, neurons=30, k=6).rows)
    made = levels.recursive(x, (6, 3), share=0.2, steps=60)
    assert [one.codes.shape for one in made] == [(60, 6), (6, 3)]
    product = levels.token_codes(made)
    np.testing.assert_allclose(product, made[0].codes @ made[1].codes, rtol=1e-6)
    tuned = levels.tune(x, made, steps=100, lr=1e-2)
    for one in tuned:
        assert float(one.codes.min()) >= 0
    np.testing.assert_array_equal(tuned[1].groups == 0, made[1].groups == 0)
    np.testing.assert_allclose(
        tuned[0].groups, tuned[1].codes @ tuned[1].groups, atol=1e-6
    )
    before, after = (
        unexplained(x, levels.token_codes(one), one[-1].groups) for one in (made, tuned)
    )
    assert after < before - 0.01


@pytest.mark.usefixtures("as_users")
def test_what_cannot_be_factored_is_refused():
    x = jnp.asarray(rows())
    for options, fault in (
        ({"k": 13, "start": "svd"}, "k=13 must be from 1 to 12 with start='svd'"),
        ({"k": 41, "start": "kmeans"}, "k=41 must be from 1 to 40"),
        ({"k": 3, "start": "zeros"}, "Unknown start 'zeros'"),
        ({"k": 3, "share": 0.0}, "share=0.0 must be above 0"),
        ({"k": 3, "steps": 0}, "steps=0; at least one"),
    ):
        with pytest.raises(ValueError, match=fault):
            factorise(x, **options)
    with pytest.raises(ValueError, match="needed are rows"):
        factorise(x[0], 3)
    assert factors.TOLERANCE == 1e-4


def test_directions_go_through_the_output_matrix():
    lm = toy_lm()
    W_out = np.asarray(lm.params["transformer"]["h"]["1"]["mlp"]["c_proj"]["kernel"])
    groups = rows(20, 64)  # more than positions of a context
    found = concepts.through(lm, groups, "mlp_hidden.1", "mlp_out.1")
    np.testing.assert_allclose(found, groups @ W_out.T, atol=1e-4)


def test_steering_hidden_units_is_adding_what_comes_through():
    lm = toy_lm()
    sae = sae_jax.SAE(64, 8, rule="relu")
    one = sae_jax.TrainedSAE(sae, sae.init(jax.random.key(2)))
    tokens = np.arange(16).reshape(2, 8)
    direction = concepts.through(
        lm, np.asarray(one.variables.params["W_dec"])[3:4], "mlp_hidden.0", "mlp_out.0"
    )[0]
    amount = 5 * float(np.linalg.norm(direction))
    found = concepts.Steering(lm, "mlp_out.0", tokens)(direction, amount)
    edit = steering.add(one, [3], 5.0)
    run = lm.run(tokens, write={"mlp_hidden.0": edit}, logits=True)
    p = jax.nn.softmax(run.logits)
    np.testing.assert_allclose(found.prediction, p.mean((0, 1)), atol=1e-5)
    clean = jax.nn.log_softmax(lm.run(tokens, logits=True).logits)
    np.testing.assert_allclose(found.loss, -(p * clean).sum(2).mean(), rtol=1e-5)


def test_success_is_of_the_concept_and_of_the_clean_models_loss():
    lm = toy_lm()
    held = concepts.Steering(lm, "mlp_out.1", np.arange(16).reshape(2, 8))
    words = np.array([5, 9])
    assert held.success(held.plain, words) == concepts.Success(0.0, 1.0)
    more = held.plain.prediction.copy()
    more[5] += 0.25
    steered = concepts.Steered(more, held.plain.loss + np.log(2))
    found = held.success(steered, words)
    before = held.plain.share(words)
    np.testing.assert_allclose(found.concept, 0.25 / (1 - before), rtol=1e-6)
    np.testing.assert_allclose(found.fluency, 0.5)
    c = found.concept
    np.testing.assert_allclose(found.both, 2 / (1 / c + 1 / 0.5))
    assert concepts.Success(0.0, 0.0).both == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_concept_is_what_stands_where_a_feature_is_strongest(ahead):
    rng = np.random.default_rng(0)
    tokens = rng.integers(30, size=(12, 20))
    strength = np.where(tokens == 7, 2.0, 0) + np.where(tokens == 3, 1.0, 0)
    strength += 0.1 * rng.uniform(size=tokens.shape)
    tokens[:, 1:][tokens[:, :-1] == 7] = 11
    use = np.ones(tokens.shape, bool)
    found = concepts.concept(strength, tokens, use, ahead=ahead)
    expected = oracle.concept(strength, tokens, ahead)
    weights = [expected[token] for token in found.tolist()]
    assert len(found) == min(10, len(expected))
    np.testing.assert_allclose(weights, sorted(expected.values())[::-1][: len(found)])
    assert {*found[:2].tolist()} == {7, 3} if ahead == 0 else found[0] == 11
    assert len(concepts.concept(0 * strength, tokens, use)) == 0


def test_detection_is_the_log_of_a_ratio_of_largest_activations():
    found = concepts.s_cd(np.array([2.0, 4.0]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(found, np.log(2))
    assert np.isnan(concepts.s_cd(np.zeros(0), np.ones(2)))
    assert concepts.s_cd(np.ones(1), np.zeros(2)) == np.inf
    tokens = np.array([[1, 2, 3, 4, 5, 6, 9, 9]])
    strength = np.array([[0.0, 4.0, 0.0, 0.0, 1.0, 0.5, 7.0, 7.0]])
    found = concepts.detection(strength, tokens, np.array([3]), length=3)
    # The last two tokens are no whole window.
    np.testing.assert_allclose(found, np.log(4.0))
    order = concepts.of_others(9, seed=3)
    assert sorted(order) == list(range(9))
    assert (order != np.arange(9)).all()
