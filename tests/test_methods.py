"""The acceptance checks of the methods: small exact ones, and training (slow)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import SAE, AuxK, select, to_dense
from sae_jax import quasi_orthogonality as quasi
from sae_jax.rules.jump_relu import jump, step
from sae_jax.training.optim import project
from sae_jax.training.terms import loss_terms
from tests.conftest import planted
from tests.contract import rows

KEY = jax.random.key(0)


# Top-AFA and quasi-orthogonality


def test_top_afa_reproduces_the_authors_worked_example():
    a = jnp.array([[5.0, 4, 3], [1, 1, 1], [1, 10, 2]])
    W_dec = jnp.array([[1.0, 2], [3, 4], [5, 6]])
    target = jnp.linalg.norm(a @ W_dec, axis=1)
    np.testing.assert_allclose(target, [54.41, 15, 67.80], atol=0.01)
    strengths = a * jnp.linalg.norm(W_dec, axis=1)
    nearest = select.norm_cut(strengths, target, how="nearest")
    np.testing.assert_array_equal(nearest.sum(1), [2, 2, 2])
    np.testing.assert_array_equal(a * nearest, [[0, 4, 3], [0, 1, 1], [0, 10, 2]])
    exceed = select.norm_cut(strengths, target, how="exceed")
    np.testing.assert_array_equal(exceed.sum(1), [3, 3, 3])


def cut_after_rescaling(scale_strengths: bool):
    """Share of rows whose cut survives moving norm from codes into decoder rows."""
    sae = SAE(16, 64, rule="top_afa")
    params = sae.init(KEY).params
    c = jax.random.uniform(jax.random.key(1), (64,), minval=0.2, maxval=5)
    counts = []
    for factor in (jnp.ones(64), c):
        W_enc, W_dec = (
            params["W_enc"] / factor[:, None],
            params["W_dec"] * factor[:, None],
        )
        if scale_strengths:
            changed = {**params, "W_enc": W_enc, "W_dec": W_dec}
            variables = sae_jax.Variables(changed, {}, {})
            counts.append(sae_jax.codes.l0(sae.encode(variables, rows(0, 400))))
        else:
            pre = jax.nn.relu(rows(0, 400) @ W_enc.T)
            norms = jnp.linalg.norm(rows(0, 400), axis=1)
            counts.append(select.norm_cut(pre, norms).sum(1))
    return float((counts[0] == counts[1]).mean())


def test_top_afa_does_not_depend_on_decoder_norms():
    assert cut_after_rescaling(True) == 1
    assert cut_after_rescaling(False) < 0.5, "without ||d_j|| it would"


def test_top_afa_finds_the_support_of_an_orthonormal_code():
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.normal(size=(64, 64)))[0].astype(np.float32)
    true = np.zeros((500, 64), np.float32)
    for row in true:
        row[rng.choice(64, 5, replace=False)] = rng.uniform(0.5, 1.5, 5)
    x = true @ V
    a = np.where(x @ V.T < 1e-4, 0, x @ V.T)
    found = select.norm_cut(jnp.asarray(a), jnp.linalg.norm(jnp.asarray(x), axis=1))
    np.testing.assert_array_equal(np.asarray(found) & (a > 0), true > 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_cross_term_never_passes_its_bound(seed, x64):
    rng = np.random.default_rng(seed)
    d, h, s = rng.integers(4, 64), rng.integers(4, 200), rng.integers(1, 12)
    V = rng.normal(size=(h, d))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    f = np.zeros((50, h))
    for row in f:
        row[rng.choice(h, min(s, h), replace=False)] = rng.uniform(0, 2, min(s, h))
    epsilon = np.abs(V @ V.T - np.eye(h)).max()
    cross = np.abs(((f @ V) ** 2).sum(1) - (f**2).sum(1))
    bound = np.asarray(quasi.cross_term_bound(jnp.asarray(f), epsilon))
    assert (cross <= bound + 1e-12).all()
    assert (bound <= epsilon * (s - 1) * (f**2).sum(1) + 1e-12).all()
    assert (bound < 1.01 * epsilon * (np.abs(f).sum(1) ** 2)).all()
    assert bound.max() > 0 or s == 1


def test_epsilon_lbo_of_exact_and_of_doubled_codes():
    rng = np.random.default_rng(1)
    V = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    f = (rng.random((100, 64)) < 0.1) * rng.uniform(0.5, 1.5, (100, 64)) + 1e-3
    z, V, f = (jnp.asarray(a, jnp.float32) for a in (f @ V, V, f))
    norm_z = jnp.linalg.norm(z, axis=1)
    exact = quasi.epsilon_lbo(norm_z, quasi.scaled_norm(f, V), 64)
    assert exact.max() < 1e-7
    doubled = quasi.epsilon_lbo(norm_z, quasi.scaled_norm(2 * f, V), 64)
    np.testing.assert_allclose(doubled, 0.75 / 63, rtol=1e-5)
    # The bias counts as a feature, and decoder norms count.
    np.testing.assert_allclose(
        quasi.scaled_norm(f, 3 * V, jnp.full(64, 0.5)),
        np.sqrt(9 * (np.asarray(f) ** 2).sum(1) + 16),
        rtol=1e-5,
    )


def test_with_enough_budget_topk_batch_topk_and_relu_coincide():
    outputs = []
    for rule in ("topk(k=64)", "batch_topk(k=64.0)", "relu"):
        sae = SAE(16, 64, rule=rule)
        outputs.append(to_dense(sae.forward(sae.init(KEY), rows(), train=True).codes))
    np.testing.assert_array_equal(outputs[0], outputs[2])
    np.testing.assert_array_equal(outputs[1], outputs[2])


# Unit tests of the baselines


def test_projected_gradients_are_orthogonal_to_decoder_rows():
    sae = SAE(16, 64, rule="relu")
    params = {**sae.init(KEY).params, "W_dec": 3 * jax.random.normal(KEY, (64, 16))}
    grads = jax.tree.map(lambda p: jnp.cos(5 * p), params)
    projected = project(grads, params)["W_dec"]
    unit = params["W_dec"] / jnp.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    assert jnp.abs((projected * unit).sum(1)).max() < 1e-6
    assert jnp.abs((grads["W_dec"] * unit).sum(1)).max() > 0.1


def gradients_of(term, rule, idle, aux=None):
    sae = SAE(16, 64, rule=rule)
    variables = sae.init(KEY)

    def value(params):
        out = sae.forward(variables._replace(params=params), rows(), train=True)
        return loss_terms(out, None, idle, aux)[term]

    return jax.grad(value)(variables.params)


def test_live_features_do_not_feel_aux_k_unless_asked():
    idle = jnp.where(jnp.arange(64) < 10, 99, 0)
    for detach in (True, False):
        grads = gradients_of("aux", "topk(k=4)", idle, AuxK(k=4, detach=detach))
        assert (grads["W_dec"][:10] != 0).any()
        assert bool((grads["W_dec"][10:] != 0).any()) is not detach
        assert bool((grads["W_enc"][10:] != 0).any()) is not detach
        assert bool((grads["b_enc"][10:] != 0).any()) is not detach


def test_the_gate_of_gated_does_not_train_the_decoder():
    grads = gradients_of("gate", "gated", jnp.zeros(64, int))
    assert not grads["W_dec"].any()
    assert grads["W_enc"].any()


def test_jump_relu_pseudo_derivatives_follow_the_formulas():
    z = jnp.array([-1, 0, 0.2, 0.31, 0.39, 0.41, 0.49, 0.51, 0.9, 3.0])[:, None]
    theta, epsilon = jnp.array([0.4]), 0.2
    inside = (jnp.abs(z - theta) < epsilon / 2)[:, 0]
    assert inside.sum() == 4
    for i in range(len(z)):
        _, pull = jax.vjp(lambda z, t: jump(z, t, epsilon), z[i : i + 1], theta)
        d_z, d_theta = pull(jnp.full((1, 1), 7.0))
        assert d_z[0, 0] == (7 if z[i, 0] > 0.4 else 0)
        np.testing.assert_allclose(d_theta[0], -7 * 0.4 / 0.2 * inside[i], rtol=1e-6)
        _, pull = jax.vjp(lambda z, t: step(z, t, epsilon), z[i : i + 1], theta)
        d_z, d_theta = pull(jnp.full((1, 1), 7.0))
        assert d_z[0, 0] == 0
        np.testing.assert_allclose(d_theta[0], -7 / 0.2 * inside[i], rtol=1e-6)
    # The gradient for a threshold sums over rows; that of its logarithm is theta-fold.
    sums = jax.grad(lambda t: step(z, t, epsilon).sum())(theta)
    np.testing.assert_allclose(sums, -inside.sum() / 0.2, rtol=1e-6)
    of_log = jax.grad(lambda s: step(z, jnp.exp(s), epsilon).sum())(jnp.log(theta))
    np.testing.assert_allclose(of_log, 0.4 * sums, rtol=1e-6)


def test_matryoshka_with_one_prefix_is_batch_topk():
    specs = "matryoshka(k=4.0, prefixes=[1.0])", "batch_topk(k=4.0)"
    idle = jnp.zeros(64, int)
    a, b = (gradients_of("mse", spec, idle) for spec in specs)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_training_with_and_without_jit_agrees():
    sae, optimiser = SAE(16, 64, rule="topk(k=4)"), sae_jax.adam(1e-3)
    results = []
    for jit in (True, False):
        state = sae_jax.init_state(sae, optimiser, KEY)
        take = sae_jax.make_step(sae, optimiser, jit=jit)
        for seed in range(3):
            state, _ = take(state, {"x": rows(seed)})
        results.append(state.variables.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *results
    )


# Training on planted truth: 40,000 rows, Adam 2e-3 with warm-up and cosine to 5 %,
# batches of 256, gradients clipped at 1 on a loss summed over width, 1 / D here.
# Bands leave slack around five measured seeds. Top-AFA found every direction on 8 of 8
# seeds, and on 7 of 8 unclipped: now and then one direction is lost for good.


def train(rule, x, steps, seed, *, n_features):
    lr = optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 20, steps, 1e-4)
    sae = SAE(x.shape[1], n_features, rule=rule)
    optimiser = sae_jax.adam(lr, clip=1 / x.shape[1])
    state = sae_jax.init_state(sae, optimiser, jax.random.key(seed))
    take = sae_jax.make_step(sae, optimiser)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        batch = jnp.asarray(x[rng.integers(0, len(x), 256)])
        state, metrics = take(state, {"x": batch})
    return sae, state.variables, metrics


def scores(sae, variables, x, directions, *, train=False):
    """FVU, L0 and mean over true directions of the best cosine."""
    out = sae.forward(variables, jnp.asarray(x), train=train)
    error = np.asarray(out.x_hats[-1]) - x
    fvu = (error**2).sum() / ((x - x.mean(0)) ** 2).sum()
    W_dec = np.asarray(variables.params["W_dec"])
    W_dec = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    mmcs = (directions @ W_dec.T).max(1).mean()
    return float(fvu), float(sae_jax.codes.l0(out.codes).mean()), float(mmcs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_top_afa_recovers_an_orthonormal_dictionary(seed):
    rng = np.random.default_rng(seed)
    V = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    true = (rng.random((41_500, 32)) < 0.1) * rng.uniform(0.5, 1.5, (41_500, 32))
    true = true[(true > 0).any(1)]
    x = (true @ V).astype(np.float32)
    sae, variables, _ = train("top_afa(coef=0.03125)", x, 4000, seed, n_features=32)
    fvu, l0, mmcs = scores(sae, variables, x, V)
    print(f"FVU {fvu:.2e}  L0 {l0:.2f} of {(true > 0).sum(1).mean():.2f}  MMCS {mmcs}")
    assert mmcs > 0.99
    assert fvu < 1e-3
    assert abs(l0 - (true > 0).sum(1).mean()) < 0.3


# rule, bands for FVU, L0 and MMCS. Coefficients of a loss summed over width, / 32.
PLANTED = {
    "topk": ("topk(k=3)", (0.15, 0.23), (2.8, 3.01), (0.95, 1)),
    "batch_topk": ("batch_topk(k=3.2)", (0.10, 0.17), (3.15, 3.21), (0.92, 1)),
    "relu": ("relu(coef=0.00625)", (0.06, 0.10), (6.5, 9.0), (0.97, 1)),
    "gated": ("gated(coef=0.025)", (0.06, 0.11), (3.2, 4.1), (0.98, 1)),
    "jump_relu": (
        "jump_relu(coef=0.003125, bandwidth=0.05, first_threshold=0.05)",
        (0.09, 0.15),
        (2.8, 3.6),
        (0.94, 1),
    ),
    "matryoshka": (
        "matryoshka(k=3.2, prefixes=[0.125, 0.25, 0.5, 1.0])",
        (0.17, 0.25),
        (3.15, 3.21),
        (0.84, 0.92),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_baselines_on_a_planted_dictionary(seed):
    x, directions, true = planted(32, 64, 0.05, 40_000, seed)
    assert abs((true > 0).sum(1).mean() - 3.2) < 0.05
    found, trained = {}, {}
    for name, (rule, *_) in PLANTED.items():
        sae, variables, _ = train(rule, x, 6000, seed, n_features=64)
        trained[name] = sae, variables
        whole = name in ("batch_topk", "matryoshka")
        found[name] = scores(sae, variables, x, directions, train=whole)
        print(
            f"{name:12} FVU {found[name][0]:.3f} L0 {found[name][1]:.2f} "
            f"MMCS {found[name][2]:.3f}"
        )
    for name in ("batch_topk", "matryoshka"):
        fvu, l0, _ = scores(*trained[name], x, directions)
        print(f"{name:12} FVU {fvu:.3f} L0 {l0:.2f} by its threshold")
        assert abs(l0 - 3.2) < 0.2
    assert found["batch_topk"][0] < 0.85 * found["topk"][0]
    thresholds = np.exp(trained["jump_relu"][1].params["log_threshold"])
    assert np.median(thresholds) > 0.2
    for name, (_, *bands) in PLANTED.items():
        for value, (low, high) in zip(found[name], bands, strict=True):
            assert low <= value <= high, f"{name}: {found[name]} outside {bands}"
