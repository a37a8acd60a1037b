"""Scores worked by hand, and of SAEs that are known by heart."""

import math

import numpy as np

from sae_jax.evaluation import density_histogram
from tests.row_oracle import Case, by_hand, measure


def test_two_rows_of_two_worked_by_hand():
    """Codes [4, 0, 0], [0, 2, 0]; x_hat [2, 0], [0, 2]; mean [2, 1]."""
    W_enc, W_dec = [[1, 0], [0, 1], [-1, 0]], [[0.5, 0], [0, 1], [0, 1]]
    x = np.array([[4, 0], [0, 2]], np.float32)
    found, x_hat = measure(Case(*by_hand(W_enc, W_dec), x, None))
    np.testing.assert_array_equal(x_hat, [[2, 0], [0, 2]])
    assert found.scores == {
        "l0": 1.0,
        "l1": 2.0,  # of 4 * 0.5 and 2 * 1
        "description_length": 7 + math.log2(3),
        "mse": 1.0,  # (4 + 0) / 4
        "nmse": 0.4,  # 4 / (5 + 5)
        "explained_variance": 0.6,
        "explained_variance_per_row": 0.6,  # of 1 - 4 / 5 and 1 - 0 / 5
        "cosine": 1.0,
        "relative_reconstruction_bias": 8 / 12,  # (4 + 4) / (8 + 4)
        "dead": 1.0,
        "dense": 2.0,
        "norm_ratio": 0.75,  # of 2 / 4 and 2 / 2
        "norm_ratio_centred": 0.75,  # the bias is 0
        "over_activation": 0.0,
        "under_activation": 0.5,
        "afa_error": 0.25,  # of 2 / 4 and 0 / 2
        "epsilon_lbo": 0.75,  # of (16 - 4) / (2 * 4) and 0
    }
    np.testing.assert_array_equal(found.norm_z, [4, 2])
    np.testing.assert_array_equal(found.norm_f, [2, 2])
    np.testing.assert_array_equal(found.epsilon_lbo, [1.5, 0])
    np.testing.assert_array_equal(found.relative_error, [0.25, 0])  # 4 / 16 and 0 / 4
    np.testing.assert_array_equal(found.density, [0.5, 0.5, 0])


def test_norms_with_the_bias_and_without_worked_by_hand():
    """b_dec [3, 0]; rows [3, 4], [7, 0]; codes [0, 4], [4, 0]; x_hat exact.

    With bias ||f|| is 5 and 5 against ||z|| 5 and 7; without it 4 and 4 against
    ||z - b_dec|| 4 and 4.
    """
    eye = np.eye(2)
    x = np.array([[3, 4], [7, 0]], np.float32)
    found, x_hat = measure(Case(*by_hand(eye, eye, np.array([3.0, 0.0])), x, None))
    np.testing.assert_array_equal(x_hat, x)
    np.testing.assert_array_equal(found.norm_z, [5, 7])
    np.testing.assert_array_equal(found.norm_f, [5, 5])
    assert found.scores["norm_ratio_centred"] == 1
    assert found.scores["norm_ratio"] == (1 + 5 / 7) / 2
    assert found.scores["afa_error"] == 1 / 7  # of 0 and 2 / 7
    assert found.scores["l1"] == 4
    assert found.scores["relative_reconstruction_bias"] == 1
    np.testing.assert_array_equal(found.relative_error, [0, 0])


def test_the_bias_of_a_reconstruction_is_the_factor_that_it_lacks():
    """x_hat / g is nearest to x at g: found by trying, and 0.7 by hand."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 4)).astype(np.float32) + 1
    both = np.vstack([np.eye(4), -np.eye(4)])
    for factor in (0.7, 1, 2):
        found, x_hat = measure(Case(*by_hand(both, factor * both), x, None))
        tried = np.linspace(0.5, 2.5, 2001)
        errors = [((x_hat / g - x) ** 2).sum() for g in tried]
        g = found.scores["relative_reconstruction_bias"]
        assert abs(g - factor) < 1e-6  # float32
        assert abs(g - tried[np.argmin(errors)]) <= 5e-4  # half a step
    # Noise beside the truth: g x is no longer x_hat, and g is above 1.
    W_dec = both + 0.5 * rng.normal(size=both.shape)
    found, x_hat = measure(Case(*by_hand(both, W_dec), x, None))
    errors = [((x_hat / g - x) ** 2).sum() for g in tried]
    g = found.scores["relative_reconstruction_bias"]
    assert abs(g - 1) > 0.02
    assert abs(g - tried[np.argmin(errors)]) <= 5e-4


def test_scores_do_not_see_norm_that_moves_from_codes_into_decoder_rows():
    rng = np.random.default_rng(3)
    W_enc, W_dec = rng.normal(size=(2, 9, 4))
    x = rng.normal(size=(41, 4)).astype(np.float32)
    price = 2.0 ** rng.integers(-3, 4, (9, 1))  # powers of two: no rounding
    one, _ = measure(Case(*by_hand(W_enc, W_dec), x, None))
    other, _ = measure(Case(*by_hand(W_enc * price, W_dec / price), x, None))
    assert one.scores["l1"] > 0
    for name, value in one.scores.items():
        # float32, and epsilon is a difference.
        np.testing.assert_allclose(other.scores[name], value, rtol=1e-5, err_msg=name)


def test_a_doubled_decoder_over_activates_and_half_a_decoder_under_activates():
    rng = np.random.default_rng(4)
    V = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    x = (np.abs(rng.normal(size=(40, 8))) @ V).astype(np.float32)
    for factor, over, under in ((2, 1, 0), (0.5, 0, 1)):
        scores = measure(Case(*by_hand(V, factor * V), x, None))[0].scores
        assert (scores["over_activation"], scores["under_activation"]) == (over, under)
        # float32, in all that follows.
        assert abs(scores["afa_error"] - abs(factor - 1)) < 1e-6
        assert abs(scores["norm_ratio"] - factor) < 1e-6
        assert abs(scores["relative_reconstruction_bias"] - factor) < 1e-6
        error = (factor - 1) ** 2 * (x**2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert abs(scores["nmse"] - error) < 1e-5


def test_an_sae_that_never_activates():
    sae, variables = by_hand(np.zeros((6, 3)), np.eye(6)[:, :3])
    x = np.array([[1, 2, 2], [3, 0, 4], [0, 0, 9]], np.float32)
    found, _ = measure(Case(sae, variables, x, None))
    scores = found.scores
    for name in ("l0", "l1", "description_length", "cosine", "dense", "norm_ratio"):
        assert scores[name] == 0, name
    assert (scores["over_activation"], scores["under_activation"]) == (0, 1)
    assert (scores["afa_error"], scores["dead"]) == (1, 6)
    assert math.isnan(scores["relative_reconstruction_bias"])  # 0 / 0
    np.testing.assert_array_equal(found.relative_error, 1)


def test_a_random_sae_explains_less_than_the_mean_row():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(99, 16)).astype(np.float32)
    c = Case(*by_hand(*rng.normal(size=(2, 64, 16))), x, None)
    scores = measure(c)[0].scores
    assert scores["explained_variance"] < 0
    assert scores["explained_variance_per_row"] < 0
    assert scores["explained_variance"] == 1 - scores["nmse"]


def test_dense_features_are_active_on_more_than_a_tenth_of_the_rows():
    """Ten rows; the first feature is active on one of them, the second on two."""
    x = np.full((10, 2), -1, np.float32)
    x[0, 0] = x[0, 1] = x[1, 1] = 1
    found, _ = measure(Case(*by_hand(np.eye(2), np.eye(2)), x, None))
    np.testing.assert_array_equal(found.density, [0.1, 0.2])
    assert found.scores["dense"] == 1


def test_a_density_histogram_by_hand():
    rare = np.array([0, 0, 0.001, 0.01, 0.011, 0.1, 0.5, 1, 1])
    found = density_histogram([rare, np.zeros(3), np.array([0.2])])
    np.testing.assert_array_equal(found.edges, np.arange(-12, 1) / 4)
    expected = np.zeros((3, 12))
    # Two decades up is bin 4 of three decades, and so on; 1 is in the last bin.
    expected[0, [0, 4, 8, 10, 11]] = [1, 2, 1, 1, 2]
    expected[2, 9] = 1  # log10 0.2 = -0.7
    np.testing.assert_array_equal(found.counts, expected)
    np.testing.assert_array_equal(found.dead, [2, 3, 0])
    nothing = density_histogram([np.zeros(3)])
    np.testing.assert_array_equal(nothing.edges, [-1, -0.75, -0.5, -0.25, 0])
    np.testing.assert_array_equal(nothing.counts, [[0, 0, 0, 0]])
    assert density_histogram([]).counts.shape == (0, 4)


def test_rows_count_alike_in_the_mean_of_ratios_and_by_their_spread_in_nmse():
    """Negative rows give x_hat 0, others themselves; the mean of all is 0."""
    sae, variables = by_hand([[1], [0]], [[1], [1]])
    x = np.array([[-3], [-1], [4]], np.float32)
    found, _ = measure(Case(sae, variables, x, None))
    assert found.scores["nmse"] == 10 / 26  # errors 9, 1, 0; spreads 9, 1, 16
    assert found.scores["explained_variance"] == 1 - 10 / 26
    per_row = found.scores["explained_variance_per_row"]
    np.testing.assert_allclose(per_row, 1 / 3, rtol=1e-7)
    assert found.scores["cosine"] == 1 / 3  # an empty reconstruction points nowhere
    x = np.array([[-3], [0], [3]], np.float32)
    found, _ = measure(Case(sae, variables, x, None))
    assert found.scores["nmse"] == 0.5
    per_row = found.scores["explained_variance_per_row"]
    assert math.isnan(per_row)  # 0 / 0 in the second


def test_norms_of_the_paper_on_an_orthonormal_dictionary():
    """z = f V exactly, so ||z|| = ||f||; codes twice as long: |1 - 4| / (4 (F - 1))."""
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    x = np.abs(rng.normal(size=(40, 8))) @ V
    for length, expected in ((1, 0), (2, 0.75 / 7)):
        c = Case(*by_hand(length * V, V), x.astype(np.float32), None)
        found, _ = measure(c)
        assert abs(found.scores["epsilon_lbo"] - expected) < 1e-6  # float32
        assert abs(found.scores["norm_ratio"] - length) < 1e-6
    # The same vectors from decoder rows of length 3 and codes of a third.
    found, _ = measure(Case(*by_hand(V / 3, 3 * V), x.astype(np.float32), None))
    assert found.scores["epsilon_lbo"] < 1e-6


def test_empty_codes_have_an_infinite_epsilon():
    """No bias: rows below zero have norm_f 0, a row of zeros 0 / 0."""
    sae, variables = by_hand([[1], [0]], [[1], [1]])
    x = np.array([[-1], [0], [-2], [2]], np.float32)
    found, _ = measure(Case(sae, variables, x, None))
    np.testing.assert_array_equal(found.epsilon_lbo, [np.inf, np.inf, np.inf, 0])
    assert found.scores["epsilon_lbo"] == np.inf
    assert found.scores["norm_ratio"] == 0  # of 0, 0 and 1; the row of zeros has none
    assert found.scores["afa_error"] == 2 / 3
    nothing, _ = measure(Case(sae, variables, np.zeros((2, 1), np.float32), None))
    assert math.isnan(nothing.scores["norm_ratio"])
    assert math.isnan(nothing.scores["afa_error"])


def test_a_large_common_mean_does_not_cancel():
    """Rows of spread 1 around 1000: the sum of squares is 1e6 times the spread."""
    rng = np.random.default_rng(1)
    x = (1000 + rng.normal(size=(999, 8))).astype(np.float32)
    # x_hat leaves half of x - b_dec.
    eye = np.eye(8)
    sae, variables = by_hand(
        np.vstack([eye, -eye]), np.vstack([eye, -eye]) / 2, np.full(8, 1000.0)
    )
    found, x_hat = measure(Case(sae, variables, x, None), range(100, 999, 100))
    wide = x.astype(np.float64)
    x_hat = x_hat.astype(np.float64)
    error = ((wide - x_hat) ** 2).sum(1)
    spread = ((wide - wide.mean(0)) ** 2).sum(1)
    scores = found.scores
    # float32 knows numbers near 1000 to 6e-5, and rows of 8 spread by about 3.
    np.testing.assert_allclose(scores["nmse"], error.sum() / spread.sum(), rtol=2e-5)
    expected = (1 - error / spread).mean()
    per_row = scores["explained_variance_per_row"]
    np.testing.assert_allclose(per_row, expected, rtol=2e-5)
    assert abs(scores["nmse"] - 0.25) < 1e-2


def test_scores_without_a_spread_are_nan_and_silent():
    sae, variables = by_hand([[1], [-1]], [[1], [-1]])
    for x in ([[2.0]], [[2.0]] * 3):
        found, _ = measure(Case(sae, variables, np.array(x, np.float32), None))
        nan = {name for name, value in found.scores.items() if math.isnan(value)}
        expected = {"nmse", "explained_variance", "explained_variance_per_row"}
        assert nan == expected
