"""Gradient TopK: what it shares with TopK, what its units are, and what it is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import SAE, Rule, from_selection, select
from sae_jax.binding import bind
from sae_jax.rules.gradient_topk import gradient_topk, score
from tests.contract import differ, gradient_of_model, rows, same

KEY = jax.random.key(3)


def sparse_and_dense():
    """An SAE of each form of codes: k far below its features, and near them."""
    return [("k=3", 512), ("k=20", 64)]


@pytest.mark.parametrize(("k", "n_features"), sparse_and_dense())
@pytest.mark.parametrize("treatment", ["none", "standardise"])
def test_with_beta_0_it_is_topk_to_the_bit(k, n_features, treatment):
    """Codes, reconstructions, and what 20 steps of training make of them."""
    found = []
    for rule in (f"topk({k})", f"gradient_topk({k}, beta=0.0)"):
        sae = SAE(16, n_features, rule=rule, treatment=treatment)
        optimiser = sae_jax.adam(1e-2)
        state = sae_jax.init_state(sae, optimiser, KEY)
        step = sae_jax.make_step(sae, optimiser)
        for i in range(20):
            state, _ = step(state, {"x": rows(i), "grad": rows(100 + i)})
        applied = sae.apply(state.variables, rows(), grad_x=rows(7))
        found.append(jax.tree.leaves((state.variables, applied)))
    same(*found)


def test_the_score_without_beta_is_the_preactivation_to_the_bit():
    pre, effect = rows(), jnp.abs(rows(1))
    same(score(pre, effect, beta=0.0, mode="add"), pre)


def test_rows_without_a_gradient_are_encoded_as_by_topk():
    """The last row of a context has none; new text has none at all."""
    topk, x = SAE(16, 64, rule="topk(k=4)"), rows()
    variables = topk.init(KEY)
    expected = topk.encode(variables, x)
    last = jnp.arange(len(x))[:, None] % 5 == 0
    grad_x = jnp.where(last, 0, gradient_of_model(x))
    for options in ("", "mode='attribution'", "normalise=True"):
        sae = SAE(16, 64, rule=f"gradient_topk(k=4, beta=9.0, {options})")
        same(sae.encode(variables, x), expected)
        codes = sae.encode(variables, x, grad_x=grad_x)
        same(codes[last[:, 0]], expected[last[:, 0]])
        assert differ(codes, expected)


@pytest.mark.parametrize("c", [4.0, 0.01])
@pytest.mark.parametrize("mode", ["add", "attribution"])
def test_a_larger_gradient_is_a_larger_beta(c, mode):
    """And one that is normalised has no size at all."""
    x, g = rows(), gradient_of_model(rows())

    def codes(beta, grad_x, normalise=False):
        rule = f"gradient_topk(k=4, {beta=}, {mode=}, {normalise=})"
        sae = SAE(16, 64, rule=rule)
        return sae.encode(sae.init(KEY), x, grad_x=grad_x)

    same(codes(3.0, g), codes(3.0 / c, c * g))
    same(codes(3.0, g, True), codes(3.0, c * g, True))
    assert differ(codes(3.0, g, True), codes(3.0, g)) == (mode == "add")


def test_nothing_is_learned_through_the_score():
    """Neither the gradient nor the decoder that it meets moves a code's value."""
    sae = SAE(16, 64, rule="gradient_topk(k=4, beta=5.0)")
    variables = sae.init(KEY)

    def total(W_dec, grad_x):
        params = {**variables.params, "W_dec": W_dec}
        out = sae.forward(
            variables._replace(params=params), rows(), grad_x=grad_x, train=True
        )
        return sae_jax.to_dense(out.codes).sum()

    given = variables.params["W_dec"], gradient_of_model(rows())
    for gradient in jax.grad(total, argnums=(0, 1))(*given):
        assert not gradient.any()


def test_an_empty_ranking_is_refused():
    with pytest.raises(ValueError, match="nothing to rank by; give beta=1"):
        SAE(16, 64, rule="gradient_topk(k=4, beta=0.0, mode='attribution')")
    with pytest.raises(ValueError, match="k=65 must be above 0 and at most"):
        SAE(16, 64, rule="gradient_topk(k=65)")


# Loud and quiet: of 48 orthonormal directions 24 are loud, 4 of them in every row, and
# 24 quiet, one in every row, which is what the model has to tell. Its loss is felt in
# the quiet ones alone.

D, N, TEMPERATURE = 64, 24, 10.0
CLEAN, CHANCE = 0.387, np.log(N)
N_ROWS, N_HELD_OUT, STEPS = 40_000, 4_096, 5_000


@functools.cache
def loud_and_quiet(seed, n=N_ROWS + N_HELD_OUT):
    """Rows, labels, the quiet directions."""
    rng = np.random.default_rng(seed)
    V = np.linalg.qr(rng.normal(size=(D, D)))[0][: 2 * N]
    loud = np.argsort(rng.random((n, N)), axis=1)[:, :4]
    codes = np.zeros((n, 2 * N))
    codes[np.arange(n)[:, None], loud] = rng.uniform(1, 2, (n, 4))
    label = rng.integers(N, size=n)
    codes[np.arange(n), N + label] = rng.uniform(0.3, 0.5, n)
    return (codes @ V).astype(np.float32), label, V[N:].astype(np.float32)


def losses(x, label, quiet):
    logits = TEMPERATURE * x @ quiet.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


@jax.jit
def gradients(x, label, quiet):
    return jax.grad(lambda x: losses(x, label, quiet).sum())(x)


def as_value(inputs, params, state, *, k: int = 4, beta: float = 10.0):
    """The score is the code: wrong."""
    if inputs.grad_x is None:
        return from_selection(gradient_topk)(inputs, params, state, k=k, k_max=k)
    effect = jnp.abs(inputs.grad_x @ inputs.weights.W_dec.T)
    scores = score(inputs.pre, effect, beta=beta, mode="add")
    chosen = select.rows(scores, k, count_max=k)
    return sae_jax.Encoded(jnp.where(chosen, jax.nn.relu(scores), 0), state, {})


def signed(inputs, *, k: int = 4, beta: float = 10.0):
    """The product keeps its sign: wrong."""
    if inputs.grad_x is None:
        return gradient_topk(inputs, k=k, k_max=k)
    effect = inputs.grad_x @ inputs.weights.W_dec.T
    scores = score(inputs.pre, effect, beta=beta, mode="add")
    return select.rows(scores, k, count_max=k)


def wrong(encode):
    rule = Rule(
        "wrong",
        paper="none",
        decides="wrongly",
        encode=encode,
        example={"k": 4},
        knob="k",
        needs=frozenset({"grad_x"}),
        without_gradient="as TopK",
    )
    return bind(rule, rule.example)


def trained(rule, seed):
    """Adam 2e-3 with warm-up and cosine to 5 %, 256 rows, clipped at 1 / D."""
    x, label, quiet = loud_and_quiet(seed)
    rows = {"x": jnp.asarray(x), "grad": gradients(x, label, quiet)}
    lr = optax.warmup_cosine_decay_schedule(0, 2e-3, STEPS // 20, STEPS, 1e-4)
    sae = SAE(D, 64, rule=rule)
    optimiser = sae_jax.adam(lr, clip=1 / D)
    state = sae_jax.init_state(sae, optimiser, jax.random.key(seed))
    step = sae_jax.make_step(sae, optimiser, aux=None, jit=False)
    drawn = np.random.default_rng(seed).integers(0, N_ROWS, (STEPS, 256))

    @jax.jit
    def go(state):
        def one(state, i):
            return step(state, {name: all_[i] for name, all_ in rows.items()})[0], None

        return jax.lax.scan(one, state, jnp.asarray(drawn))[0]

    return sae, go(state).variables


def measured(rule, seed):
    """FVU, CE of the reconstruction, dead; the first two without gradients as well."""
    sae, variables = trained(rule, seed)
    x, label, quiet = loud_and_quiet(seed)
    x, label = x[N_ROWS:], label[N_ROWS:]
    found = []
    for grad_x in (gradients(x, label, quiet), None):
        x_hat, codes = sae.apply(variables, jnp.asarray(x), grad_x=grad_x)
        fvu = float(((x_hat - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
        ce = float(losses(x_hat, label, quiet).mean())
        dead = int((np.asarray(sae_jax.to_dense(codes)) == 0).all(0).sum())
        found += [fvu, ce, dead]
    fvu, ce, dead, fvu_without, ce_without, _ = found
    print(
        f"{rule!s:36} seed {seed}  FVU {fvu:.3f}  CE {ce:.2f}  dead {dead:2d}  "
        f"without gradients: FVU {fvu_without:.3f}  CE {ce_without:.2f}"
    )
    return fvu, ce, dead


def test_the_loss_of_the_check_is_as_it_is_meant_to_be():
    x, label, quiet = loud_and_quiet(0)
    assert abs(losses(x, label, quiet).mean() - CLEAN) < 0.02
    assert abs(losses(0 * x, label, quiet).mean() - CHANCE) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_makes_quiet_features_heard(seed):
    found = {
        beta: measured(f"gradient_topk(k=4, beta={beta})", seed)
        for beta in (0.0, 1.0, 3.0, 10.0)
    }
    none, strong = found[0.0], found[10.0]
    assert none[1] > 3.0
    assert strong[1] < 2.2
    assert strong[0] > none[0]
    assert strong[2] < none[2] / 3
    crossings = [ce for _, ce, _ in found.values()]
    assert sorted(crossings, reverse=True) == crossings


@pytest.mark.slow
@pytest.mark.parametrize("encode", [as_value, from_selection(signed)])
def test_wrong_versions_do_not(encode):
    """As in the paper's formula but for one thing, they fall out of these bands."""
    none = measured("gradient_topk(k=4, beta=0.0)", 0)
    fvu, ce, dead = measured(wrong(encode), 0)
    assert not (ce < 2.2 and fvu > none[0] and dead < none[2] / 3)
