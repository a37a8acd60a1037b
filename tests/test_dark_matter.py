"""Linear and nonlinear error: planted ones, all scores by oracles, language models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import SAE
from sae_jax.analysis import gradient_pursuit
from sae_jax.analysis.dark_matter import Fit, Score, dark_matter, of_rows
from sae_jax.analysis.least_squares import Explained, Sums
from sae_jax.binding import bind
from sae_jax.evaluation import Evaluator
from tests import analysis_oracles as oracles
from tests import contract
from tests.row_oracle import by_hand
from tests.test_spliced import held_out, splice_one_by_one, values_at
from tests.toys import toy_lm

SITE = "resid_post.0"
# float64 sums in another order, and normal equations: the condition, about 10, squared.
EXACT = 1e-9
# Losses of two float32 programs that compute the same.
LOSS = 2e-6


def rows(n=600, width=6, seed=0, mean=0.7):
    """Rows of uneven spread, and reconstructions that are wrong in both ways."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) * rng.uniform(0.5, 2, width) + mean
    error = 0.3 * x @ rng.normal(size=(width, width)) + 0.2 * np.sin(3 * x)
    return x, x - error - 0.05 * rng.normal(size=x.shape)


def halves(n):
    return np.arange(n) < n // 2


def test_a_planted_linear_and_a_sine_error_are_told_apart():
    """The check: all but the sine, whose share of the variance is known, is linear."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, 16)) * rng.uniform(0.5, 2, 16) + 1
    sine = 0.3 * np.sin(3 * x)
    x_hat = x - 0.8 * x @ rng.normal(size=(16, 16)) / 4 - sine
    scores = of_rows(x, x_hat, halves(8000)).scores
    share = sine.var(0).sum() / x.var(0).sum()
    assert abs(scores["fvu_nonlinear"] / share - 1) < 0.2
    assert 0.6 < scores["fvu"] < 1.1
    assert 0.93 < scores["error_vector_r2"] < 0.98
    assert abs(scores["error_vector_r2_by_chance"]) < 0.05
    # Below 0: without intercept, rows that are not its own say less than the mean.
    assert scores["error_norm_r2_by_chance"] < 0


@pytest.mark.parametrize("intercept", [False, True])
def test_every_score_is_the_oracles_however_the_rows_are_cut(intercept):
    x, x_hat = rows()
    fitted = halves(len(x))
    expected, linear = oracles.dark_matter(x, x_hat, fitted, intercept=intercept)
    found = of_rows(x, x_hat, fitted, intercept=intercept)
    fit = Fit(intercept=intercept)
    for part in np.split(np.flatnonzero(fitted), [7, 120]):
        fit.add(x[part], x_hat[part])
    score = Score(fit.finish())
    for part in np.split(np.flatnonzero(~fitted), [1, 40, 40]):
        score.add(x[part], x_hat[part])
    for one in (found, score.finish()):
        for name, value in expected.items():
            np.testing.assert_allclose(one.scores[name], value, rtol=EXACT)
        np.testing.assert_allclose(one.parts.linear(x), linear, atol=1e-10)
        squared = np.square(x - x_hat).sum(1)[~fitted]
        np.testing.assert_allclose(one.squared_error, squared)
    by_chance = {n for n in found.scores if n.endswith("by_chance")}
    assert found.scores.keys() - by_chance == expected.keys()


def test_of_directions_that_rows_hardly_have_the_shortest_map_is_taken():
    x, _ = rows()
    x = np.concatenate([x, x[:, :2] - x[:, 2:4]], 1)
    y = x @ np.random.default_rng(1).normal(size=(8, 3))
    sums = Sums()
    sums.add(x, y)
    W, _ = oracles.least_squares(x, y)
    np.testing.assert_allclose(sums.solve().W, W, atol=1e-9)


def test_scores_on_the_rows_that_were_fitted_would_flatter():
    """An error that has nothing to do with the rows, and few rows to fit it on."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 90, 20))
    x_hat, fitted = x - noise, np.arange(90) < 45
    found = of_rows(x, x_hat, fitted)
    again = Score(found.parts)
    again.add(x[fitted], x_hat[fitted])
    flattering = again.finish().scores
    assert flattering["error_vector_r2"] > 0.3 > 0 > found.scores["error_vector_r2"]
    assert flattering["fvu_nonlinear"] < 0.7 * flattering["fvu"]
    assert found.scores["fvu_nonlinear"] > found.scores["fvu"]


def test_a_large_mean_lets_a_map_without_intercept_say_what_is_constant():
    """The mean of ||e||^2 is no linear function of centred rows.

    It costs some of the first coordinate's slope, 2, which the four others take back.
    """
    r2 = {}
    for mean in (0.0, 30.0):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(4000, 5))
        error = (1 + 0.2 * x[:, :1]) * np.sign(rng.normal(size=(4000, 5)))
        x = x + mean
        for intercept in (False, True):
            found = of_rows(x, x - error, halves(4000), intercept=intercept)
            r2[mean, intercept] = found.scores["error_norm_r2"]
    assert r2[0.0, False] < 0 < 0.75 < r2[30.0, False]
    assert abs(r2[0.0, True] - r2[30.0, True]) < 1e-6
    assert r2[0.0, True] > 0.9


@pytest.mark.usefixtures("as_users")
def test_too_few_rows_and_no_rows_are_refused():
    x, x_hat = rows(40, width=16)
    with pytest.raises(ValueError, match="20 rows to fit a map of rows of 16 numbers"):
        of_rows(x, x_hat, halves(40))
    with pytest.raises(ValueError, match="0 rows to fit"):
        Sums().solve()
    with pytest.raises(ValueError, match="No rows were added"):
        Explained().r2()
    sae = SAE(16, 64, rule="relu")
    variables = sae.init(jax.random.key(0))
    with pytest.raises(ValueError, match="1 contexts make no two halves"):
        dark_matter(Evaluator(toy_lm(), held_out(1)), sae, variables, SITE)
    with pytest.raises(ValueError, match=r"to fit a map .*; give at least 32"):
        dark_matter(Evaluator(toy_lm(), held_out(4)), sae, variables, SITE)
    coder = SAE(16, 64, rule="relu", d_out=16)
    with pytest.raises(ValueError, match="is a transcoder: its error"):
        dark_matter(Evaluator(toy_lm(), held_out()), coder, variables, SITE)


def test_columns_that_never_vary_have_no_r2():
    explained, y = Explained(), np.array([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    explained.add(y, np.array([[0.1, 1.0], [0.2, 2.0], [0.1, 4.0]]))
    assert explained.r2() == 1
    constant = Explained()
    constant.add(y[:, :1], y[:, :1])
    assert np.isnan([constant.r2(), constant.unexplained()]).all()


def evaluator(n=24):
    return Evaluator(toy_lm(), held_out(n, skip=1), contexts_per_pass=8)


def both_halves(heldout):
    """The used rows of the first contexts and of the last, and which are the first."""
    halves = heldout.halves()
    x = [values_at(half, SITE)[half.use] for half in halves]
    return jnp.asarray(np.concatenate(x)), np.arange(len(x[0]) + len(x[1])) < len(x[0])


@pytest.mark.parametrize("treatment", ["none", "scale", "standardise"])
def test_the_parts_are_put_back_into_the_model(treatment):
    """Against the oracle on the rows, and each context given to the model alone."""
    sae = SAE(16, 64, rule="topk(k=3)", treatment=treatment)
    variables = sae.init(jax.random.key(4), sample=0.2 * jnp.ones((4, 16)))
    found = dark_matter(evaluator(), sae, variables, SITE)
    heldout = held_out(24, skip=1)
    _, second = heldout.halves()
    assert len(second.tokens) == 12
    both, fitted = both_halves(heldout)
    x_hat = sae.apply(variables, both).x_hat
    expected, linear = oracles.dark_matter(np.asarray(both), np.asarray(x_hat), fitted)
    y = values_at(second, SITE)
    for name, value in expected.items():
        np.testing.assert_allclose(found.scores[name], value, rtol=1e-3, atol=1e-4)
    held = {name: y.copy() for name in ("clean", "spliced", "linear", "nonlinear")}
    held["spliced"][second.use] = x_hat[~fitted]
    held["linear"][second.use] = x_hat[~fitted] + linear[~fitted]
    held["nonlinear"][second.use] -= linear[~fitted]
    losses = {n: splice_one_by_one(second, SITE, value) for n, value in held.items()}
    assert len({round(loss, 5) for loss, _ in losses.values()}) == 4
    close = 20 * LOSS  # the linear map itself comes from float32 rows
    for name in ("linear", "nonlinear"):
        assert abs(found.scores[f"loss_with_{name}"] - losses[name][0]) < close
        assert abs(found.scores[f"kl_with_{name}"] - losses[name][1]) < close
    for name in ("clean", "spliced"):
        assert abs(found.scores[f"loss_{name}"] - losses[name][0]) < close
    (whole, _), (rest, _) = losses["spliced"], losses["linear"]
    share = (whole - rest) / (whole - losses["clean"][0])
    assert abs(found.scores["linear_share_of_loss"] - share) < 0.05


def test_no_error_loses_nothing_and_an_error_of_all_is_linear():
    sae, variables = by_hand(np.zeros((2, 16)), np.zeros((2, 16)))
    scores = dark_matter(evaluator(), sae, variables, SITE).scores  # x_hat = 0
    assert scores["fvu_nonlinear"] < 1e-9
    assert abs(scores["error_vector_r2"] - 1) < 1e-9
    assert abs(scores["loss_with_linear"] - scores["loss_clean"]) < LOSS
    assert abs(scores["loss_with_nonlinear"] - scores["loss_spliced"]) < LOSS
    eye = np.eye(16)
    whole = by_hand(np.vstack([eye, -eye]), np.vstack([eye, -eye]))
    scores = dark_matter(evaluator(), *whole, SITE).scores
    assert scores["fvu"] == 0
    for name in ("spliced", "with_linear", "with_nonlinear"):
        assert abs(scores[f"loss_{name}"] - scores["loss_clean"]) < LOSS


@pytest.mark.parametrize("name", sorted(sae_jax.RULES))
def test_every_rule_has_its_error_split_and_its_dictionary_searched(name):
    rule = sae_jax.RULES[name]
    sae, variables = contract.build(bind(rule, rule.example))
    x, fitted = both_halves(evaluator().heldout)
    pursuit = partial(gradient_pursuit.reconstruct, sae, variables)
    every_row = jnp.ones(len(x), bool)
    for way, x_hat in (
        (None, sae.apply(variables, x).x_hat),
        (pursuit, pursuit(x, every_row)),
    ):
        found = dark_matter(evaluator(), sae, variables, SITE, reconstruct=way).scores
        assert np.isfinite([*found.values()]).all()
        expected, _ = oracles.dark_matter(np.asarray(x), np.asarray(x_hat), fitted)
        for score, value in expected.items():
            np.testing.assert_allclose(found[score], value, rtol=1e-3, atol=1e-4)
        assert found["loss_with_linear"] != found["loss_spliced"]
