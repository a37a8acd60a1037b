"""Steering against its formula written out, by hand, and inside language models."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import GPT2Config

from sae_jax import RULES, SAE, TrainedSAE, Variables
from sae_jax.binding import bind
from sae_jax.evaluation.steering import ablate, add, clamp, scale
from sae_jax.lm.flax_lm import FlaxLM
from tests.compilations import compilations
from tests.contract import build, rows
from tests.toys import toy_lm

B, T, D, F = 4, 6, 16, 64
SITE = "resid_post.0"
# Sums of 16 float32 products of size 6, taken in another order.
NEAR = {"rtol": 1e-5, "atol": 1e-5}
OPTIONS = {
    "none": {},
    "standardise": {"treatment": "standardise"},
    "scale": {"treatment": "scale", "b_dec_start": "mean"},
}
# Every rule as it is; the treatments with dense codes and with sparse ones.
CASES = [
    pytest.param(rule, options, id=f"{rule}-{name}")
    for rule in RULES
    for name, options in OPTIONS.items()
    if name == "none" or rule in ("relu", "topk")
]


def made(rule="relu(coef=0.01)", *, seed=0, **options):
    """An SAE away from its starting point."""
    sae = SAE(D, F, rule=rule, **options)
    variables = sae.init(jax.random.key(seed), sample=rows(9))
    noise = jax.random.normal(jax.random.key(seed + 1), (D,))
    params = {**variables.params, "b_dec": variables.params["b_dec"] + 0.2 * noise}
    return TrainedSAE(sae, variables._replace(params=params))


def by_hand():
    """Two wide, three features: x, y, and a long one to the lower left."""
    params = {
        "W_enc": jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]),
        "b_enc": jnp.zeros(3),
        "W_dec": jnp.array([[2.0, 0.0], [0.0, 3.0], [-1.0, -4.0]]),
        "b_dec": jnp.zeros(2),
    }
    return TrainedSAE(SAE(2, 3, rule="relu(coef=0.1)"), Variables(params, {}, {}))


def site_value():
    return rows(0, B * T).reshape(B, T, D)


@jax.jit
def edited(edit, old):
    return edit(old)


def often_active(sae):
    """Three features: the one that is active most often, the least, one between."""
    order = np.argsort((np.asarray(sae.encode(site_value())) != 0).sum((0, 1)))
    return [int(order[-1]), int(order[0]), int(order[F // 2])]


# The formula --------------------------------------------------------------------------


def test_by_hand():
    """x = (5, 2) has the codes (5, 2, 0); x_hat = (10, 6) is off by (-5, -4)."""
    sae, x = by_hand(), jnp.array([[[5.0, 2.0], [-1.0, 0.5]]])
    np.testing.assert_array_equal(sae.encode(x)[0], [[5, 2, 0], [0, 0.5, 0.5]])
    for edit, expected in (
        (add(sae, [0], 1.5), [[8, 2], [2, 0.5]]),
        (add(sae, [2], 2.0), [[3, -6], [-3, -7.5]]),
        (add(sae, [1, 0], [-1.0, 2.0]), [[9, -1], [3, -2.5]]),
        (clamp(sae, [1], 4.0), [[5, 8], [-1, 11]]),  # active in both
        (clamp(sae, [0], 1.0), [[-3, 2], [1, 0.5]]),  # in the first only
        (clamp(sae, [2, 0], [1.0, 5.0]), [[4, -2], [8.5, -1.5]]),
        (
            scale(sae, [1, 2], [-1.0, 3.0]),
            [[5, -10], [-2, -6.5]],
        ),  # 3 less of 1, 1 more
        (ablate(sae, [0]), [[-5, 2], [-1, 0.5]]),
        (ablate(sae, [2, 1]), [[5, -4], [-0.5, 1]]),
    ):
        np.testing.assert_array_equal(edit(x)[0], expected)


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_the_error_is_kept_whatever_the_rule(rule, options):
    """The site becomes x_hat' + (x - x_hat), from whole reconstructions."""
    sae = TrainedSAE(*build(bind(RULES[rule], RULES[rule].example), **options))
    x = site_value()
    features, amounts = often_active(sae), np.array([2.5, -1.0, 0.75], np.float32)
    before = sae.encode(x)
    error = np.asarray(x - sae.decode(before, like=x), np.float64)
    assert np.abs(error).max() > 0.1
    for edit, change in (
        (add(sae, features, amounts), lambda f: f + amounts),
        (clamp(sae, features, amounts), lambda f: 0 * f + amounts),
        (scale(sae, features, amounts), lambda f: f * amounts),
        (ablate(sae, features), lambda f: 0 * f),
    ):
        after = np.array(before)
        after[..., features] = change(after[..., features])
        expected = np.asarray(sae.decode(after, like=x)) + error
        np.testing.assert_allclose(edited(edit, x), expected, **NEAR)
        assert np.abs(expected - x).max() > 0.1


def test_one_amount_is_for_all_features_and_ids_come_in_any_integers():
    sae, x = made(), site_value()
    expected = clamp(sae, [3, 9], [2.0, 2.0])(x)
    for ids in ([3, 9], np.array([9, 3]), jnp.array([3, 9])):
        np.testing.assert_allclose(clamp(sae, ids, 2.0)(x), expected, **NEAR)


def test_positions_that_are_not_meant_stay_as_they_are():
    sae, x = made(), site_value()
    where = jnp.asarray(np.random.default_rng(2).random((B, T)) < 0.5)
    active = [often_active(sae)[0]]
    for make in (
        partial(clamp, amounts=9.0),
        partial(add, amounts=2.0),
        partial(scale, amounts=-8.0),
        ablate,
    ):
        everywhere, some = (make(sae, active, where=w)(x) for w in (None, where))
        np.testing.assert_array_equal(some[where], everywhere[where])
        np.testing.assert_array_equal(some[~where], x[~where])
        assert (some[where] != x[where]).any()


# What follows from it -----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["relu(coef=0.01)", "topk(k=4)"])
@pytest.mark.parametrize("treatment", ["none", "standardise"])
def test_a_feature_that_does_not_change_leaves_every_bit(rule, treatment):
    sae, x = made(rule, treatment=treatment), site_value()
    codes = np.asarray(sae.encode(x))
    feature = often_active(sae)[0]
    silent = codes[..., feature] == 0
    assert 0 < silent.sum() < silent.size
    found = edited(ablate(sae, [feature]), x)
    np.testing.assert_array_equal(found[silent], x[silent])
    assert (found[~silent] != x[~silent]).any(-1).all()
    found = edited(scale(sae, [feature], -8.0), x)
    np.testing.assert_array_equal(found[silent], x[silent])
    np.testing.assert_array_equal(edited(add(sae, [feature, 3], 0.0), x), x)
    value = float(codes[0, 0].max())
    same = edited(clamp(sae, [int(codes[0, 0].argmax())], value), x)
    np.testing.assert_array_equal(same[0, 0], x[0, 0])


@pytest.mark.parametrize("treatment", ["none", "scale", "standardise"])
def test_adding_twice_is_adding_the_sum_and_back_is_back(treatment):
    """Under "standardise" the spread, which scales the amount, is that of the row."""
    sae, x = made(treatment=treatment), site_value()
    twice = add(sae, [5], 0.5)(add(sae, [5], 1.25)(x))
    if treatment == "standardise":
        spread = np.asarray(x).std(-1, ddof=1, keepdims=True)
        direction = np.asarray(sae.variables.params["W_dec"])[5]
        moved = np.asarray(add(sae, [5], 2.0)(x)) - x
        np.testing.assert_allclose(moved, 2 * spread * direction, **NEAR)
        return
    np.testing.assert_allclose(twice, add(sae, [5], 1.75)(x), **NEAR)
    np.testing.assert_allclose(add(sae, [5], -1.75)(twice), x, **NEAR)


def test_clamping_again_does_nothing_where_the_sae_is_perfect():
    """Orthonormal features: what is written is what is read, and has no error."""
    columns, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    W_enc = jnp.asarray(columns, jnp.float32)
    zeros = jnp.zeros(D)
    params = {"W_enc": W_enc, "b_enc": zeros, "W_dec": W_enc, "b_dec": zeros}
    sae = TrainedSAE(SAE(D, D, rule="relu(coef=0.1)"), Variables(params, {}, {}))
    codes = np.random.default_rng(1).uniform(0, 3, (B, T, D)).astype(np.float32)
    x = sae.decode(codes)
    edit = clamp(sae, [2, 7], [5.0, 0.5])
    once = edit(x)
    codes[..., [2, 7]] = 5.0, 0.5
    np.testing.assert_allclose(sae.encode(once), codes, **NEAR)
    np.testing.assert_allclose(once, sae.decode(codes), **NEAR)
    np.testing.assert_allclose(edit(once), once, **NEAR)


def test_a_site_in_bfloat16_is_rounded_once():
    sae, x = made(dtype="bfloat16"), site_value().astype(jnp.bfloat16)
    edit = clamp(sae, [3, 8], [4.0, 0.3])
    found = edit(x)
    assert found.dtype == jnp.bfloat16
    codes = np.asarray(sae.encode(x), np.float32)[..., [3, 8]]
    W_dec = np.asarray(sae.variables.params["W_dec"])[[3, 8]]
    exact = np.asarray(x, np.float32) + (np.float32([4.0, 0.3]) - codes) @ W_dec
    rounded = np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32)
    found = np.asarray(found, np.float32)
    # A float32 sum in another order may fall to the other side of a half.
    np.testing.assert_allclose(found, rounded, rtol=2**-7, atol=1e-6)
    assert (found == rounded).mean() > 0.99
    np.testing.assert_array_equal(add(sae, [3], 0.0)(x), x)


# In language models -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 64, (B, T)).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_reads_what_was_written(dtype, tokens):
    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=D, n_layer=2, n_head=2)
    lm, sae = FlaxLM.random(config, dtype=dtype), made("topk(k=8)")
    x = lm.run(tokens, read=(SITE,)).values[SITE]
    edit = clamp(sae, [7], 6.0)
    run = lm.run(tokens, read=(SITE,), write={SITE: edit}, logits=True)
    found, expected = run.values[SITE], edit(x)
    assert found.dtype == x.dtype == dtype
    # Two programs: a rounding of the site's own type.
    near = {"float32": NEAR, "bfloat16": {"rtol": 2**-7, "atol": 2**-7}}[dtype]
    found, expected = (np.asarray(v, np.float32) for v in (found, expected))
    np.testing.assert_allclose(found, expected, **near)
    assert np.isfinite(np.asarray(run.logits, np.float32)).all()
    _, gradients = lm.gradients(tokens, (SITE,), write={SITE: edit})
    assert np.isfinite(np.asarray(gradients[SITE], np.float32)).all()


def test_a_model_is_the_same_to_float_rounding_without_a_silent_feature(tokens):
    """Not promised to the bit: the compiler may fuse the pass in another way."""
    lm, sae = toy_lm(), made("topk(k=2)")
    plain = lm.run(tokens, read=(SITE,), logits=True)
    silent = (np.asarray(sae.encode(plain.values[SITE])) == 0).all((0, 1))
    edit = ablate(sae, np.flatnonzero(silent)[:5])
    run = lm.run(tokens, write={SITE: edit}, logits=True)
    np.testing.assert_allclose(run.logits, plain.logits, **NEAR)


def test_other_features_amounts_and_arrays_do_not_compile_again(tokens):
    lm = FlaxLM.random(toy_lm().config, seed=4)
    edits = [
        clamp(made(), [1, 2], 3.0),
        clamp(made(), [5, 60], [0.5, 9.0]),
        clamp(made(seed=8), np.array([5, 60]), -1.0),
        ablate(made(), [4, 3]),
    ]
    with compilations("forward") as compiled:
        logits = [lm.run(tokens, write={SITE: e}, logits=True).logits for e in edits]
    assert len(compiled) == 1
    assert all((a != b).any() for a, b in itertools.pairwise(logits))


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "amounts", "message"),
    [
        ([64], 1.0, r"\[64\] are none of this SAE's, 0 to 63"),
        ([-1, 3], 1.0, r"\[-1\]"),
        ([3, 3], 1.0, "an id twice"),
        ([], 1.0, "one or more ids"),
        (3, 1.0, r"such as \[12\]"),
        ([3.0], 1.0, "float64"),
        ([3, 4], [1.0], "one for each of the 2"),
        ([3], float("nan"), "finite"),
        ([99, 99], "big", r"\[99, 99\].*\n.*twice.*\n.*finite"),  # all at once
    ],
)
def test_what_cannot_be_changed_is_refused(features, amounts, message, as_users):
    for make in (add, clamp):
        with pytest.raises(ValueError, match=message):
            make(made(), features, amounts)


def test_transcoders_are_refused():
    sae = SAE(D, F, rule="topk(k=4)", d_out=D)
    one = TrainedSAE(sae, sae.init(jax.random.key(0)))
    with pytest.raises(ValueError, match="steer with an autoencoder"):
        ablate(one, [1])


def test_a_site_of_another_width_is_refused(tokens):
    with pytest.raises(ValueError, match=r"needed is \[rows, 16\]"):
        toy_lm().run(tokens, write={"mlp_hidden.0": ablate(made(), [1])}, logits=True)
