"""The cosines inside a dictionary, against matrices in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import coherence

# Four directions and a row of zeros; the signed cosines are 0 .6 -.8 -.8 -.6 0.
BY_HAND = np.array([[2.0, 0], [0, 3], [0, 0], [0.6, -0.8], [-4, -3]])
SIZES = [0, 0.6, 0.8, 0.8, 0.6, 0]  # |cos| of rows 01, 03, 04, 13, 14, 34


def gaussian(n_features, width, seed=0):
    return np.random.default_rng(seed).normal(size=(n_features, width))


def sizes(W_dec):
    """|cos| of all pairs, one after the other."""
    unit = [row / math.hypot(*row) for row in W_dec if row.any()]
    return np.array(
        [abs(unit[i] @ unit[j]) for i in range(len(unit)) for j in range(i)]
    )


def close(found, expected, atol):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_by_hand(x64):
    found = coherence.exact(BY_HAND, quantiles=(0, 0.3, 0.5, 0.8, 1), block=2)
    close(found.maximum, 0.8, 1e-15)
    close(found.mean, sum(SIZES) / 6, 1e-15)
    assert (found.n_pairs, found.n_zero) == (6, 1)
    assert found.standard_error == 0
    assert found.bin_error == 2.0**-17
    close([*found.quantiles.values()], [0, 0, 0.6, 0.8, 0.8], 2.0**-17)
    near = coherence.nearest(BY_HAND, n=2, block=2)
    # Of equal ones the first; the row of zeros has none and is none.
    np.testing.assert_array_equal(near.indices[[0, 2]], [[4, 3], [-1, -1]])
    np.testing.assert_array_equal(near.indices[[1, 3, 4]], [[3, 4], [1, 0], [0, 1]])
    close(near.cosines[[0, 1, 4]], [[-0.8, 0.6], [-0.8, -0.6], [-0.8, -0.6]], 1e-15)
    assert np.isnan(near.cosines[2]).all()


@pytest.mark.parametrize("shape", [(2, 3), (37, 5), (64, 32), (129, 16)])
def test_exact_equals_all_pairs_one_by_one(shape, x64):
    W_dec = gaussian(*shape)
    W_dec[0] *= 1e-200  # squares of which are 0
    expected = sizes(W_dec)
    for block in (1, 8, 37, 4096):
        if block == 1 and len(W_dec) > 37:
            continue  # thousands of tiles
        found = coherence.exact(W_dec, block=block)
        close(found.maximum, expected.max(), 1e-14)
        close(found.mean, expected.mean(), 1e-14)
        assert found.n_pairs == len(expected)
        assert found.n_zero == 0
        values = np.quantile(expected, coherence.QUANTILES, method="inverted_cdf")
        assert [*found.quantiles] == [*coherence.QUANTILES]
        close([*found.quantiles.values()], values, found.bin_error)


def test_in_float32_it_is_off_by_rounding_only():
    W_dec = gaussian(300, 64)
    found, expected = coherence.exact(W_dec.astype(np.float32), block=64), sizes(W_dec)
    # Sums of 64 products, each rounded to 6e-8 of at most 1.
    close(found.maximum, expected.max(), 1e-6)
    close(found.mean, expected.mean(), 1e-6)
    narrow = coherence.exact(jnp.asarray(W_dec, jnp.bfloat16), block=64)
    # Rows were rounded to 8 bits, but nothing after that.
    rounded = np.asarray(jnp.asarray(W_dec, jnp.bfloat16), np.float64)
    close(narrow.maximum, sizes(rounded).max(), 1e-6)


def test_neither_lengths_nor_opposite_directions_hide_anything():
    W_dec = gaussian(20, 64)
    plain = coherence.exact(W_dec)
    scaled = coherence.exact(W_dec * np.logspace(-12, 12, 20)[:, None])
    close(scaled.maximum, plain.maximum, 1e-6)
    assert plain.maximum < 0.6
    W_dec[7] = -3 * W_dec[2]  # signed maxima, as the authors', do not see this
    found = coherence.exact(W_dec)
    close(found.maximum, 1, 1e-6)
    assert found.maximum <= 1
    near = coherence.nearest(W_dec, n=1)
    assert (near.indices[7, 0], near.indices[2, 0]) == (2, 7)
    close(near.cosines[[2, 7]], -1, 1e-6)


def test_orthonormal_and_equal_rows():
    orthonormal = coherence.exact(np.eye(6), quantiles=(0.5,))
    assert orthonormal.maximum == orthonormal.mean == orthonormal.quantiles[0.5] == 0
    equal = coherence.exact(np.ones((6, 3)), quantiles=(0.5,))
    close([equal.maximum, equal.mean], 1, 1e-6)
    close(equal.quantiles[0.5], 1, equal.bin_error)
    assert equal.n_pairs == 15


@pytest.mark.parametrize("block", [4, 7, 50, 4096])
def test_nearest_features_equal_a_sort_of_all(block, x64):
    W_dec = gaussian(50, 8, seed=1)
    W_dec[11] = 0
    unit = W_dec / np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), 1e-9)
    cos = unit @ unit.T
    near = coherence.nearest(W_dec, n=3, block=block)
    for i in range(50):
        if i == 11:
            assert (near.indices[i] == -1).all()
            continue
        others = [j for j in range(50) if j not in (i, 11)]
        order = sorted(others, key=lambda j: -abs(cos[i, j]))[:3]
        assert near.indices[i].tolist() == order
        close(near.cosines[i], cos[i, order], 1e-14)


def test_all_others_can_be_asked_for():
    near = coherence.nearest(np.eye(5), n=4, block=2)
    for i, row in enumerate(near.indices):
        assert row.tolist() == [j for j in range(5) if j != i]


def test_a_sample_finds_what_all_pairs_have():
    W_dec = gaussian(200, 16)
    exact = coherence.exact(W_dec)
    close(exact.mean, sizes(W_dec).mean(), 1e-6)
    means, errors = [], []
    for seed in range(20):
        found = coherence.sampled(W_dec, n_pairs=20_000, seed=seed)
        assert found.n_pairs == 20_000
        assert found.bin_error == 0
        assert found.maximum <= exact.maximum + 1e-6
        means.append(found.mean)
        errors.append(found.standard_error)
        # Of 20,000 pairs 20 lie above the last quantile; the sample's share of them
        # varies by a fifth of it.
        for q, value in found.quantiles.items():
            close(value, exact.quantiles[q], 0.03)
    z = (np.array(means) - exact.mean) / np.array(errors)
    # 20 standard normal numbers: mean within 3.5 / sqrt(20), spread 0.5 to 1.6.
    assert abs(z.mean()) < 0.8
    assert 0.5 < z.std() < 1.6
    again = coherence.sampled(W_dec, n_pairs=20_000, seed=19)
    assert again == found


def test_a_sample_draws_all_pairs_alike_and_no_row_with_itself(x64):
    # Each of the six pairs of four rows in the plane has a cosine of its own.
    angles = np.array([0.0, 0.2, 0.5, 1.1])
    W_dec = np.stack([np.cos(angles), np.sin(angles)], 1)
    expected = np.sort(sizes(W_dec))
    quantiles = (np.arange(6) + 0.5) / 6
    found = coherence.sampled(W_dec, n_pairs=6000, seed=0, quantiles=tuple(quantiles))
    close([*found.quantiles.values()], expected, 1e-12)
    with_zeros = np.concatenate([W_dec, np.zeros((3, 2))])
    found = coherence.sampled(with_zeros, n_pairs=600, seed=0)
    assert found.n_zero == 3
    assert found.quantiles[0.5] > 0.4, "no pair with a row of zeros was drawn"


def test_bounds_by_hand_and_what_random_rows_have():
    # Three directions in the plane at 120 degrees: cosines of -1/2, and none do better.
    assert coherence.welch_bound(3, 2) == 0.5
    assert coherence.welch_bound(2, 2) == 0
    angles = 2 * np.pi / 3 * np.arange(3)
    best = coherence.exact(np.stack([np.cos(angles), np.sin(angles)], 1))
    close(best.maximum, 0.5, 1e-6)
    close(coherence.welch_bound(24576, 768), 0.0355, 5e-5)
    close(coherence.random_maximum(24576, 768), 0.23, 5e-3)
    random = coherence.exact(gaussian(1000, 256)).maximum
    # The square root is a limit, approached from below: here 0.31 against 0.33.
    assert 0.9 < random / coherence.random_maximum(1000, 256) < 1
    assert random > coherence.welch_bound(1000, 256)


def test_tiles_and_what_is_handed_over_are_no_larger_than_stated():
    block, n_features = 8, 1000
    shapes = str(
        jax.make_jaxpr(lambda unit: coherence._tile(unit, 0, 8, block=block))(
            jnp.zeros((n_features, 4))
        )
    )
    assert "8,8" in shapes
    assert "1000,1000" not in shapes
    assert "8,1000" not in shapes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: coherence.exact(W[:1]), "1 of 1 rows of W_dec are not zero"),
        (lambda W: coherence.exact(W * 0), "0 of 6 rows of W_dec are not zero"),
        (lambda W: coherence.exact(W / 0), "NaN or infinite values in 6 of 6 rows"),
        (lambda W: coherence.exact(W, quantiles=(0.5, 99)), "quantiles=.99.; give"),
        (lambda W: coherence.exact(W, block=0), "block=0; tiles have at least one"),
        (lambda W: coherence.sampled(W, n_pairs=1, seed=0), "n_pairs=1; at least 2"),
        (lambda W: coherence.nearest(W, n=0), "n=0; ask for one neighbour"),
        (lambda W: coherence.nearest(W / 0, n=1), "NaN or infinite values in 6 of 6"),
    ],
)
def test_faults(call, message):
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=message):
        call(np.ones((6, 2)))


@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_there_are_no_more_neighbours_than_others(n_rows):
    W_dec = np.zeros((n_rows + 1, 3))
    W_dec[1:] = np.eye(3)[:n_rows] + 0.1
    found = coherence.nearest(W_dec, n=4)
    known = found.indices >= 0
    assert known.sum(1).tolist() == [0] + [n_rows - 1] * n_rows
    assert (np.isfinite(found.cosines) == known).all()
    for row in range(1, n_rows + 1):
        others = set(range(1, n_rows + 1)) - {row}
        assert set(found.indices[row][known[row]]) == others
