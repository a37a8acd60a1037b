"""The package against `oracles.py`, in float64."""

import functools
import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import SAE, AuxK, Sparse, Variables, select, to_dense
from sae_jax.codes import Pairs
from sae_jax.rules.jump_relu import jump, step
from sae_jax.training.terms import loss_terms
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")

EXACT = 1e-12  # relative to the largest entry: sums may be taken in another order
DIFFERENCES = 1e-7  # what central differences with a step of 1e-5 can resolve
IN_FLOAT32 = 1e-6  # for what one variant of JumpReLU keeps in float32 always
SMALL = {"b": 6, "d": 5, "f": 12}
KEY = jax.random.key(4)  # of what rules draw

# conftest registers rules of its tests as well; those of the package have a file each.
OURS = [n for n in sae_jax.RULES if importlib.util.find_spec(f"sae_jax.rules.{n}")]
EXAMPLES = [
    f"{n}({', '.join(f'{k}={v!r}' for k, v in sae_jax.RULES[n].example.items())})"
    for n in OURS
]
MORE = [
    "relu(coef=0.3, decoder_weighted=True)",
    "topk(k=12)",
    "gradient_topk(k=4, beta=0.3, normalise=True)",
    "gradient_topk(k=12, mode='attribution')",
    "batch_topk(k=2.3)",
    "batch_topk(k=12.0)",
    "top_afa(coef=0.3, how='exceed')",
    "top_afa(coef=0.3, target='input')",
    "top_afa(coef=0.3, how='exceed', target='input')",
    "matryoshka(k=2.3, prefixes=(0.25, 1.0), bias_group=True)",
    "feature_choice(k=2.3, alpha=0.0)",
    "feature_choice(k=9.7, alpha=0.5, q=2.0)",
    "matching_pursuit(k=12)",
    "matching_pursuit(k=9, tau=1.5)",
    "matching_pursuit(k=12, until_repeat=True)",
    "group_bias(form='shifted')",
    "variational(k=3, coef=0.3, over='kept')",
    "variational(k=3, coef=0.3, variance='unit')",
    "variational(k=12, coef=0.3, variance='none', over='kept')",
]
every_example = pytest.mark.parametrize("spec", EXAMPLES)
every_spec = pytest.mark.parametrize("spec", EXAMPLES + MORE)


class Case(NamedTuple):
    sae: SAE
    variables: Variables
    params: dict[str, np.ndarray]
    x: np.ndarray
    noise: np.ndarray
    grad: np.ndarray  # of the model's loss with respect to x

    @property
    def hp(self):
        beside = {"noise": self.noise, "grad_x": self.grad}
        return {**self.sae.bound.hp, **beside}

    def codes(self, params=None):
        params = self.params if params is None else params
        if self.sae.is_transcoder:
            params = {**params, "b_dec": np.zeros(self.sae.d_in)}
        memory = {n: np.asarray(a) for n, a in self.variables.state.items()}
        encode = oracles.CODES[self.sae.bound.rule.name]
        return encode(self.x, {**memory, **params}, self.hp)

    def terms(self, params=None, target=None):
        params = self.params if params is None else params
        target = self.x if target is None else target
        rest = (self.hp, self.codes(params), target)
        return oracles.loss_terms(self.sae.bound.rule.name, self.x, params, *rest)


def case(spec, seed=0, b=7, d=16, f=64, tied=False, edges=False, **options):
    """An SAE whose biases and extras are not zero nor decoder rows of norm 1."""
    name = spec.partition("(")[0]
    assert name in oracles.CODES, f"Add {name} to CODES and LOSSES in tests/oracles.py."
    rng = np.random.default_rng(seed)
    sae = SAE(d, f, rule=spec, dtype="float64", **options)
    variables = sae.init(jax.random.key(seed))
    params = {n: np.array(p) for n, p in sorted(variables.params.items())}
    params = {n: p + 0.4 * rng.normal(size=p.shape) for n, p in params.items()}
    if "bias" in variables.state:
        memory = {"bias": -rng.random(f) / 2, "unit": np.array(1.7)}
        memory = jax.tree.map(jnp.asarray, memory)
        variables = variables._replace(state={**variables.state, **memory})
    encoder = "W_enc" if "W_enc" in params else "W_dec"
    x = 1.3 * rng.normal(size=(b, d))
    grad = np.random.default_rng(1000 + seed).normal(size=x.shape)
    if tied:  # small integers, so that sums are exact and many of them equal
        x = rng.integers(-2, 3, x.shape) * 1.0
        for n in [n for n in ("W_enc", "b_enc", "b_dec") if n in params]:
            params[n] = rng.integers(-2, 3, params[n].shape) * 1.0
        params["W_dec"] = rng.choice([-1.0, 1.0], params["W_dec"].shape)
        params["W_dec"][:, 4:] = 0  # rows of norm 2...
        params["W_dec"][::3] *= 2  # ...or 4
        grad = np.sign(grad) * 4.0 ** np.arange(b)[:, None]
    if edges:
        params[encoder][:, 0] = -0.5 - np.abs(params[encoder][:, 0])
        x[0] = 90 * np.eye(d)[0]  # every pre-activation negative
        x[1] = params["b_dec"]  # nothing left after centring
        pre = (x - params["b_dec"]) @ params[encoder].T + params.get("b_enc", 0)
        assert (pre[0] < 0).all()
        grad[2] = 0  # where the model is sure of itself
    noise = np.asarray(jax.random.normal(KEY, (b, f)))
    return with_params(Case(sae, variables, params, x, noise, grad), params)


def with_params(c, params):
    ours = c.variables._replace(params=jax.tree.map(jnp.asarray, params))
    return c._replace(params=params, variables=ours)


@functools.cache
def compiled(sae, aux, sparse_below, gradients):
    def loss(params, variables, x, grad_x, target, mask, idle, share):
        variables = variables._replace(params=params)
        beside = {"target": target, "grad_x": grad_x, "mask": mask}
        out = sae.forward(variables, x, **beside, key=KEY, train=True)
        terms = loss_terms(out, mask, idle, aux)
        total = sum(share[int(n == "aux")] * term for n, term in terms.items())
        return total, (out, terms)

    return jax.jit(jax.grad(loss, has_aux=True) if gradients else loss)


def measured(c, *, aux=None, gradients=False, share=(1.0, 1.0), **batch):
    """A training pass: outputs, loss terms, gradients (`share` of terms and of aux)."""
    batch = {"target": None, "mask": None, "idle": np.zeros(c.sae.n_features), **batch}
    run = compiled(c.sae, aux, select.SPARSE_BELOW, gradients)
    batch |= {"x": c.x, "grad_x": c.grad, "share": np.array(share)}
    arrays = jax.tree.map(jnp.asarray, batch)
    grads, (out, terms) = run(c.variables.params, c.variables, **arrays)
    return out, terms, grads


def close(ours, oracle, tolerance=EXACT):
    if isinstance(oracle, dict):
        assert set(ours) == set(oracle)
        for name in oracle:
            close(ours[name], oracle[name], tolerance)
        return
    ours, oracle = np.asarray(ours), np.asarray(oracle)
    assert ours.shape == oracle.shape
    size = np.abs(oracle).max(initial=1e-300)
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=tolerance * size)


def same_codes(ours, oracle):
    ours = np.asarray(to_dense(ours))
    np.testing.assert_array_equal(ours != 0, oracle != 0)
    close(ours, oracle)


def differences(c, loss):
    """Finite differences of `loss`, which must not cross a change of the support."""
    support = c.codes() != 0

    def guarded(params):
        np.testing.assert_array_equal(c.codes(params) != 0, support)
        return loss({**params, **oracles.frozen(c.params)})

    return oracles.finite_differences(guarded, c.params)


@every_spec
def test_codes_reconstructions_and_losses_equal_the_oracle(spec):
    for seed in range(6):
        for size in ({}, SMALL):
            c = case(spec, seed, tied=seed % 2 == 1, edges=seed > 1, **size)
            out, terms, _ = measured(c, gradients=size == SMALL)  # compiled anyway
            same_codes(out.codes, c.codes())
            close(out.x_hats[-1], oracles.reconstruct(c.codes(), c.params))
            close(terms, c.terms())


@every_example
def test_masked_rows_count_for_nothing(spec):
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    c = case(spec, seed=4, **SMALL)
    out, terms, _ = measured(c, mask=mask)
    c = c._replace(x=c.x[mask], noise=c.noise[mask], grad=c.grad[mask])
    same_codes(to_dense(out.codes)[mask], c.codes())
    close(terms, c.terms())


@pytest.mark.parametrize("bias_group", [False, True])
def test_each_prefix_reconstructs_as_in_the_oracle(bias_group):
    c = case(f"matryoshka(k=4.0, prefixes=(0.125, 0.25, 1.0), {bias_group=})")
    bound, args = c.sae.bound, (c.x, c.codes(), c.params)
    errors, mean = oracles.matryoshka_losses(*args, bound.hp)
    out, terms, _ = measured(c)
    close([oracles.mse(np.asarray(x), c.x) for x in out.x_hats], errors)
    close(terms["mse"], mean)
    assert len(errors) == 3 + bias_group


@every_spec
def test_gradients_of_the_loss_equal_finite_differences(spec):
    c = case(spec, seed=3, **SMALL)
    _, _, ours = measured(c, gradients=True)
    oracle = differences(c, lambda params: sum(c.terms(params).values()))
    if "log_threshold" in ours:  # its pseudo-derivative has a test of its own
        oracle["log_threshold"] = ours["log_threshold"]
    close(ours, oracle, DIFFERENCES)


@pytest.mark.parametrize("variant", ["paper", "lee2025_code"])
def test_threshold_gradient_follows_the_formulas(variant):
    spec = f"jump_relu(coef=0.3, bandwidth=1.0, first_threshold=0.4, {variant=})"
    c = case(spec, seed=5)
    pre, codes = oracles.preactivations(c.x, c.params), c.codes()
    theta = np.exp(c.params["log_threshold"])
    error = oracles.reconstruct(codes, c.params) - c.x
    by_codes = 2 / c.x.size * error @ c.params["W_dec"].T
    by_count = np.full(pre.shape, 0.3 / len(c.x))
    seen, counted = (pre, pre) if variant == "paper" else (np.maximum(pre, 0), codes)
    oracle = oracles.jump_gradients(seen, theta, 1.0, by_codes)["jump_threshold"]
    oracle += oracles.jump_gradients(counted, theta, 1.0, by_count)["step_threshold"]
    out, _, ours = measured(c, gradients=True)
    same_codes(out.codes, codes)
    if variant == "paper":
        close(ours["log_threshold"], oracle * theta)
    else:  # which forgets the factor, and counts in float32
        close(ours["log_threshold"], oracle, IN_FLOAT32)


def test_jump_and_step_have_the_gradients_of_the_formulas():
    threshold = np.array([0.2, 1.0])
    pre = np.array([[0.0, 0.79], [0.11, 0.9], [0.29, 1.19], [0.41, 1.21], [-3.0, 5.0]])
    upstream = np.random.default_rng(0).normal(size=pre.shape)
    oracle = oracles.jump_gradients(pre, threshold, 0.4, upstream)
    for name, function in (("jump", jump), ("step", step)):
        arrays = map(jnp.asarray, (pre, threshold))
        _, pull = jax.vjp(lambda p, t, f=function: f(p, t, 0.4), *arrays)
        for part, ours in zip(("pre", "threshold"), pull(upstream), strict=True):
            close(ours, oracle[f"{name}_{part}"])


AUX_CASES = [("topk(k=3)", d, n) for d in (False, True) for n in (False, True)]
AUX_CASES += [("matryoshka(k=3.0)", False, False), ("top_afa", False, True)]


@pytest.mark.parametrize(("spec", "detach", "normalise"), AUX_CASES)
def test_aux_k_and_its_gradients_equal_the_oracle(spec, detach, normalise):
    c = case(spec, seed=6, **SMALL)
    aux = AuxK(k=3, coef=0.4, dead_after=5, normalise=normalise, detach=detach)
    bias = c.sae.bound.rule.reads_b_enc

    def value(params):
        pre = oracles.preactivations(c.x, params, bias=bias)
        source = c.params if detach else params
        residual = c.x - oracles.reconstruct(c.codes(source), source)
        return oracles.aux_k(pre, dead, params["W_dec"], residual, 3, 0.4, normalise)

    for n_dead in (0, 2, 6, 12):
        dead = np.random.default_rng(n_dead).permutation(12) < n_dead
        settings = {"aux": aux, "idle": 4 + dead, "gradients": True}
        _, terms, ours = measured(c, share=(0.0, 1.0), **settings)
        close(terms["aux"], value(c.params))
        live = [np.asarray(ours[name])[~dead] for name in ("W_enc", "W_dec")]
        assert not detach or not any(rows.any() for rows in live)
        if n_dead == 6:
            close(ours, differences(c, value), DIFFERENCES)


SPARSE = ["topk(k=4)", "batch_topk(k=4)", "matryoshka(k=4)", "feature_choice(k=4)"]
SPARSE += ["variational(k=4, coef=0.3, over='kept')"]


@pytest.mark.parametrize("spec", SPARSE)
@pytest.mark.parametrize("d_out", [None, 12])
@pytest.mark.parametrize("normalise", [False, True])
def test_sparse_codes_change_nothing(monkeypatch, spec, d_out, normalise):
    c = case(spec, seed=7, d_out=d_out, edges=d_out is None)
    target = None if d_out is None else c.x[:, :d_out] ** 2
    aux = AuxK(8, 0.4, 5, normalise, detach=False)
    settings = {"aux": aux, "idle": np.arange(64) % 7, "target": target}
    results = []
    for below in (0, 1.0):
        monkeypatch.setattr(select, "SPARSE_BELOW", below)
        out, terms, own = measured(c, gradients=True, share=(1.0, 0.0), **settings)
        _, _, of_aux = measured(c, gradients=True, share=(0.0, 1.0), **settings)
        assert isinstance(out.codes, Sparse | Pairs) == (below == 1)
        same_codes(out.codes, c.codes())
        results.append(dict(enumerate([terms, own, of_aux])))
        close({n: v for n, v in terms.items() if n != "aux"}, c.terms(target=target))
    close(*results)


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka", "mutual_choice"])
def test_evaluation_uses_the_running_threshold_of_the_oracle(name):
    c = case(f"{name}(k=3.5, threshold_decay=0.8)", seed=8, **SMALL)
    rng = np.random.default_rng(8)
    batches = [rng.normal(size=c.x.shape) for _ in range(5)]
    batches.insert(3, np.zeros_like(c.x))  # a batch without a positive code
    bias = np.minimum(c.params["b_enc"], c.params["W_enc"] @ c.params["b_dec"] - 0.1)
    c, held_out, seen = with_params(c, {**c.params, "b_enc": bias}), c.x, []
    encode = jax.jit(c.sae.encode)
    for x in batches:
        state, threshold = c.variables.state, oracles.running_threshold(seen, 0.8)
        weight = np.asarray(state["threshold_weight"])
        close(state["threshold_sum"] / (weight or 1), threshold)
        codes = oracles.threshold_codes(held_out, c.params, threshold)
        same_codes(encode(c.variables, jnp.asarray(held_out)), codes)
        c = c._replace(x=x)
        seen.append(c.codes())
        state = measured(c)[0].state
        c = c._replace(variables=c.variables._replace(state=state))
    assert [int(codes.any()) for codes in seen] == [1, 1, 1, 0, 1, 1]


@every_example
def test_standardised_rows_go_in_and_come_out_as_in_the_oracle(spec):
    c = case(spec, seed=15, treatment="standardise", **SMALL)
    raw = jnp.asarray(3 * c.x + 5)
    out, terms, _ = measured(c._replace(x=raw))
    treated, spread, mean = oracles.standardise(3 * c.x + 5)
    raw_grad = jnp.asarray(c.grad)
    c = c._replace(x=treated, grad=c.grad * spread)
    same_codes(out.codes, c.codes())
    close(terms, c.terms())
    codes = c._replace(noise=0 * c.noise).codes()  # in evaluation none is drawn
    if c.sae.bound.rule.couples_batch:  # before any training: all that is positive
        codes = oracles.threshold_codes(treated, c.params, 0.0)
    x_hat, ours = jax.jit(c.sae.apply)(c.variables, raw, grad_x=raw_grad)
    same_codes(ours, codes)
    close(x_hat, oracles.reconstruct(codes, c.params) * spread + mean)


@pytest.mark.parametrize("f", [1, 2, 3, 33])
@pytest.mark.parametrize("how", ["nearest", "exceed"])
def test_norm_cut_keeps_what_sorting_keeps(how, f):
    rng = np.random.default_rng(f)
    smooth = rng.exponential(size=(200, f)) * 10.0 ** rng.integers(-3, 6, (200, 1))
    integers = rng.integers(0, 4, (200, f))  # ties, zeros, targets that are hit
    by_hand = np.array([[12, 5, 1e-12]] * 2) @ np.eye(3, f)
    midway_and_short = [12.5, 20]
    strengths = np.concatenate([smooth, integers, by_hand])
    target = rng.uniform(0, 1.3, 200) * oracles.row_norms(smooth)
    hit = np.sqrt(rng.integers(0, 4 * f, 200))
    target = np.concatenate([target, hit, midway_and_short])
    cut = jax.jit(functools.partial(select.norm_cut, how=how))
    ours = cut(jnp.asarray(strengths), jnp.asarray(target))
    oracle = oracles.norm_cut(strengths, target, how)
    positive = strengths > 0  # which zeros are kept makes no difference to codes
    np.testing.assert_array_equal(ours & positive, oracle & positive)


def test_norm_cut_oracle_repeats_the_worked_example_of_the_authors():
    strengths = np.array([[5, 4, 3], [1, 1, 1], [1, 10, 2]]) * np.sqrt([5, 25, 61])
    for how, count in (("nearest", 2), ("exceed", 3)):
        mask = oracles.norm_cut(strengths, np.array([54.41, 15, 67.80]), how)
        assert mask.sum(1).tolist() == [count] * 3


def test_geometric_median_equals_the_oracle():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sample = rng.normal(size=(40, 3)) * [1, 3, 0.5] + rng.exponential(size=(40, 1))
        sae = SAE(3, 8, rule="relu", dtype="float64", b_dec_start="geometric_median")
        started = sae.init(jax.random.key(0), sample=jnp.asarray(sample))
        close(started.params["b_dec"], oracles.geometric_median(sample), 1e-5)
