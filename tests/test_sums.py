"""Gradients added to a sum, product by product: the same as adding all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE, adam, init_state, make_step
from sae_jax.training import sums

B, D, F = 5, 3, 8
KEY = jax.random.key(3)
X = jax.random.normal(KEY, (B, D))
PARAMS = {
    "W_enc": jax.random.normal(jax.random.fold_in(KEY, 1), (F, D)),
    "W_dec": jax.random.normal(jax.random.fold_in(KEY, 2), (F, D)),
    "bias": jnp.linspace(-1, 1, F),
    "gain": jnp.float32(1.5),
    "unused": jnp.ones((F, D)),
}
TOTAL = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), PARAMS)


def once(params):
    return jnp.square(jnp.tanh(X @ params["W_enc"].T) @ params["W_dec"] - X).sum()


def turned(params):
    """The same, with codes that stand upright."""
    codes = jnp.tanh(params["W_enc"] @ X.T)
    return jnp.square(params["W_dec"].T @ codes - X.T).sum()


def twice(params):
    again = jnp.tanh(X[:2] @ params["W_enc"].T) @ params["W_dec"]
    return once(params) + jnp.square(again).sum()


def beside(params):
    """Gradients that are products and something else, or something else alone."""
    pre = X @ params["W_enc"].T + params["bias"]
    norms = jnp.linalg.norm(params["W_dec"], axis=1)
    upright = jnp.sin(params["W_enc"].T).sum()
    return (jax.nn.relu(params["gain"] * pre) * norms).sum() + upright + once(params)


def of_parts(params):
    halves = [X @ params["W_enc"][half].T for half in (slice(0, 5), slice(5, F))]
    return sum(jnp.sin(h).sum() for h in halves)


@pytest.mark.parametrize("at_once", [3, 4, 100])
@pytest.mark.parametrize("loss", [once, turned, twice, beside, of_parts])
def test_grown_is_the_sum_and_the_gradients(loss, at_once, monkeypatch):
    monkeypatch.setattr(sums, "AT_ONCE", at_once)

    def gradients(params, factor):
        return jax.grad(loss)(params), {"factor": 2 * factor}

    expected, _ = gradients(PARAMS, 1.0)
    expected = jax.tree.map(np.add, TOTAL, expected)
    grown = jax.jit(lambda *given: sums.grown(gradients, *given))
    found, rest = grown(TOTAL, PARAMS, jnp.float32(4))
    assert rest == {"factor": 8}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6)


def test_a_product_over_unlike_axes_may_stand_transposed():
    def gradients(W):
        return (jnp.sin(X.T * W[0, 0]) @ jnp.cos(X[:, :1] * W[:, 0])).T, None

    W, total = PARAMS["W_enc"], TOTAL["W_enc"]
    found, _ = sums.grown(gradients, total, W)
    np.testing.assert_allclose(found, total + gradients(W)[0], rtol=1e-6)


def test_products_of_rounded_operands_are_not_rounded():
    """Step by step, since what is compiled may be more precise than it has to be."""

    def gradients(W):
        half, x = W.astype(jnp.bfloat16), X.astype(jnp.bfloat16)
        return jnp.matmul(half, x.T @ x, preferred_element_type=jnp.float32), None

    W, zeros = PARAMS["W_enc"], jnp.zeros((F, D))
    with jax.disable_jit():
        found, _ = sums.grown(gradients, zeros, W)
        np.testing.assert_array_equal(found, gradients(W)[0])


@pytest.mark.parametrize("rule", ["relu", "jump_relu", "gated", "top_afa"])
def test_dense_rules_make_no_gradient_of_a_piece(rule):
    rows, width, n_features = 8, 256, 4096
    sae, optimiser = SAE(width, n_features, rule=rule), adam(1e-3, clip=None)
    state = jax.eval_shape(lambda: init_state(sae, optimiser, KEY))
    x = jax.ShapeDtypeStruct((4 * rows, width), jnp.float32)
    step = make_step(sae, optimiser, aux=None, accumulate=4)
    program = step.lower(state, {"x": x}).compile()
    matrices = program.memory_analysis().temp_size_in_bytes / (4 * width * n_features)
    assert 2 < matrices < 2.7  # the two gradients, AT_ONCE features, codes
