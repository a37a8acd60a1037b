"""What the norm of a row says of its code; `test_methods.py` has the first checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import codes as of
from sae_jax import quasi_orthogonality as quasi
from sae_jax.codes import Sparse

# Three rows of three features; the last is empty, the second has an unused slot whose
# index means nothing.
DENSE = np.array([[3.0, 0, -4], [0, 2, 0], [0, 0, 0]])
SPARSE = ([[-4.0, 3], [2, 0], [0, 0]], [[2, 0], [1, 2], [0, 1]])
W_DEC = np.array([[2.0, 0], [0, 1], [3, 4]])  # norms 2, 1, 5
B_DEC = np.array([5.0, 12])  # norm 13


def both_forms():
    values, indices = (jnp.asarray(a) for a in SPARSE)
    return jnp.asarray(DENSE), Sparse(values, indices, 3)


@pytest.mark.parametrize("form", [0, 1], ids=["dense", "sparse"])
def test_the_norm_of_scaled_codes_by_hand(form, x64):
    codes = both_forms()[form]
    # (3 * 2)^2 + (4 * 5)^2 = 436, (2 * 1)^2 = 4, nothing; and 169 more with the bias
    without = quasi.scaled_norm(codes, jnp.asarray(W_DEC))
    np.testing.assert_allclose(without**2, [436, 4, 0], rtol=1e-15)
    biased = quasi.scaled_norm(codes, jnp.asarray(W_DEC), jnp.asarray(B_DEC))
    np.testing.assert_allclose(biased**2, [605, 173, 169], rtol=1e-15)


@pytest.mark.parametrize("form", [0, 1], ids=["dense", "sparse"])
def test_the_bound_of_the_cross_term_by_hand(form):
    # l1 = 7, 2, 0: (49 - 25) / 4, and nothing to cross with in the others
    bound = quasi.cross_term_bound(both_forms()[form], 0.25)
    np.testing.assert_array_equal(bound, [6, 0, 0])


def test_sparse_codes_are_never_made_dense():
    codes = Sparse(jnp.ones((7, 2)), jnp.zeros((7, 2), int), 1001)

    def both(codes):
        scaled = quasi.scaled_norm(codes, jnp.ones((1001, 3)))
        return scaled + quasi.cross_term_bound(codes, 0.1)

    assert "7,1001" not in str(jax.make_jaxpr(both)(codes))
    dense = jnp.ones((7, 1001))
    assert "7,1001" in str(jax.make_jaxpr(both)(dense)), "the test sees such arrays"


def random_dictionary(seed, n_features=40, width=24):
    """Unit rows, sparse codes, and the eps of the rows; all in float64."""
    rng = np.random.default_rng(seed)
    V = rng.normal(size=(n_features, width))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    f = (rng.random((300, n_features)) < 0.05) * rng.uniform(0.2, 2, (300, n_features))
    return V, f, np.abs(V @ V.T - np.eye(n_features)).max()


@pytest.mark.parametrize("seed", range(3))
def test_no_code_of_a_dictionary_is_outside_of_its_interval(seed, x64):
    V, f, epsilon = random_dictionary(seed)
    norm_z, norm_f = np.linalg.norm(f @ V, axis=1), np.linalg.norm(f, axis=1)
    active = of.l0(jnp.asarray(f))
    assert 0 in active, "an empty code has an interval as well"
    assert 1 in active, "and one feature alone has no room"
    spans = []
    for n_active in (40, active):
        c = quasi.slack(epsilon, n_active)
        low, high = (np.asarray(end) for end in quasi.norm_interval(norm_z, c))
        # 1e-12: norms of z and of f are rounded apart, and at s <= 1 low = high.
        assert (low <= norm_f * (1 + 1e-12)).all()
        assert (norm_f <= high * (1 + 1e-12)).all()
        spans.append((low, high))
    (low, high), (tight_low, tight_high) = spans
    assert (low <= tight_low).all()
    assert (tight_high <= high).all()
    # The paper's s = F says little of these codes, the features that are active more.
    assert np.isinf(high).all()
    assert np.isfinite(tight_high).mean() > 0.2
    # Two directions at exactly -eps and +eps reach the ends.
    e = 0.3
    pair = np.array([[1.0, 0], [e, np.sqrt(1 - e**2)]])
    for sign, end in ((1, 0), (-1, 1)):
        z = np.linalg.norm(np.array([1.0, sign]) @ pair)
        ends = quasi.norm_interval(np.array([z]), quasi.slack(e, 2))
        np.testing.assert_allclose(ends[end], np.sqrt(2), rtol=1e-12)


def test_the_interval_by_hand_and_without_an_upper_end():
    norm_z = np.array([0.0, 6.0])
    np.testing.assert_array_equal(quasi.slack(0.25, jnp.arange(4)), [0, 0, 0.25, 0.5])
    for c, low, high in [
        (0.0, [0, 6], [0, 6]),
        (0.5625, [0, 4.8], [0, 6 / np.sqrt(0.4375)]),  # sqrt(1.5625) = 1.25
        (1.0, [0, 6 / np.sqrt(2)], [np.inf, np.inf]),
        (3.0, [0, 3], [np.inf, np.inf]),
    ]:
        ends = quasi.norm_interval(norm_z, c)
        np.testing.assert_allclose(ends, [low, high], rtol=1e-6)  # float32
    one_each = quasi.norm_interval(norm_z, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(one_each, [[0, 3], [np.inf, np.inf]])


def test_rows_that_activate_too_much_or_too_little():
    norm_z = jnp.full(5, 6.0)
    norm_f = jnp.array([4.7, 4.9, 6.0, 9.0, 9.1])
    assert quasi.misactivation(norm_z, norm_f).tolist() == [-1, -1, 0, 1, 1]
    # c = 0.5625 allows 4.8 to 9.07, and c = 1 whatever is above 4.24.
    assert quasi.misactivation(norm_z, norm_f, 0.5625).tolist() == [-1, 0, 0, 0, 1]
    assert quasi.misactivation(norm_z, norm_f, 1.0).tolist() == [0, 0, 0, 0, 0]


def test_epsilon_lbo_is_the_eps_that_puts_a_row_on_the_end_of_its_interval(x64):
    norm_z, norm_f = jnp.array([3.0, 3.0]), jnp.array([2.5, 3.2])
    for factor, expected in ((1.001, [0, 0]), (0.999, [-1, 1])):
        epsilon = factor * quasi.epsilon_lbo(norm_z, norm_f, 12)
        outside = quasi.misactivation(norm_z, norm_f, quasi.slack(epsilon, 12))
        assert outside.tolist() == expected


def test_description_lengths_of_the_paper():
    # Of the authors' notebook: GPT-2, F = 12,288. 41,938 bits are those of Top-AFA on
    # layer 6, whose L0 is published as 2037, rounded: half a feature is 10.3 bits.
    assert round(quasi.description_length(1024.0, 12288)) == 21079
    assert abs(quasi.description_length(2037.0, 12288) - 41938) < 10.3
    in_rows = quasi.description_length(jnp.array([0, 3]), 64, value_bits=2)
    np.testing.assert_array_equal(in_rows, [0, 24])
