"""Group bias adaptation: how biases move, and what it finds (slow)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import RULES, SAE, adam, init_state, make_step, to_dense
from tests import bias_oracle
from tests.contract import rows

KEY = jax.random.key(0)
SPEC = (
    "group_bias(highest=0.4, lowest=0.1, groups=3, every=3, lower=1.2, lift=0.2, "
    "dead_below=0.02)"
)
D, F, B = 6, 16, 24


def batch(i):
    """Rows to one side, so that the features of the other side do not fire."""
    return np.asarray(rows(40 + i, B, D)) + 9 * np.eye(D)[0]


def start(sae, optimiser):
    state = init_state(sae, optimiser, KEY)
    memory = state.variables.state
    bias = -(jnp.linspace(0, 1, F) ** 3)  # of which the last is as low as it may be
    variables = state.variables._replace(state={**memory, "bias": bias})
    return state.replace(variables=variables)


def biases(spec=SPEC, steps=9, make=lambda i: {"x": jnp.asarray(batch(i))}, **options):
    """Bias and unit after each step, of weights that stay as they are."""
    sae, optimiser = SAE(D, F, rule=spec), adam(0.0)
    state, take = start(sae, optimiser), make_step(sae, optimiser, aux=None, **options)
    first, found = jax.device_get(state.variables), []
    for i in range(steps):
        state, _ = take(state, make(i))
        held = jax.device_get(state.variables.state)
        found.append((held["bias"], held["unit"]))
    return sae, first, found


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_biases_follow_a_buffer_of_pre_activations(windows):
    sae, first, found = biases(SPEC.replace(")", f", {windows=})"), steps=12)
    batches, hp = [batch(i) for i in range(len(found))], sae.bound.hp
    before, kinds = first.state["bias"], set()
    expected = bias_oracle.trajectory(batches, first.params["W_dec"], before, hp)
    for i, ((bias, unit), (wanted, length)) in enumerate(
        zip(found, expected, strict=True)
    ):
        np.testing.assert_allclose(bias, wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(unit, length, rtol=1e-6)
        assert (bias != before).any() == (i % 3 == 2)
        assert -1 <= bias.min() <= bias.max() <= 0
        if i % 3 == 2:
            kinds |= {"lowered"} if (bias < before).any() else set()
            kinds |= {"lifted"} if (bias > before).any() else set()
            kinds |= {"kept"} if (bias == before).any() else set()
            kinds |= {"lowest"} if ((bias == -1) & (before > -1)).any() else set()
        before = bias
    assert kinds == {"lowered", "lifted", "kept", "lowest"}


def test_a_longer_buffer_gives_other_biases():
    of = [biases(SPEC.replace(")", f", windows={n})"))[2][-1][0] for n in (1, 2)]
    assert (of[0] != of[1]).any()


def test_rows_that_do_not_count_are_not_in_the_statistics():
    def with_rest(i):
        x = np.concatenate([batch(i), 50 * batch(i + 1)[:7]])
        return {"x": jnp.asarray(x), "mask": jnp.arange(B + 7) < B}

    for (bias, unit), (wanted, length) in zip(
        biases(make=with_rest)[2], biases()[2], strict=True
    ):
        np.testing.assert_allclose(bias, wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(unit, length, rtol=1e-6)


def test_steps_count_not_pieces():
    found = [bias for bias, _ in biases(accumulate=4)[2]]
    moved = [(a != b).any() for a, b in itertools.pairwise(found)]
    assert moved == [False, True, False, False, True, False, False, True]


def test_a_run_that_starts_again_at_step_0_goes_on_counting():
    sae, optimiser = SAE(D, F, rule=SPEC), adam(0.0)
    state, take = start(sae, optimiser), make_step(sae, optimiser, aux=None)
    moved = []
    for i in range(6):
        if i == 4:
            state = dataclasses.replace(state, step=jnp.int32(0))
        before = np.asarray(state.variables.state["bias"])
        state, _ = take(state, {"x": jnp.asarray(batch(i))})
        moved.append((before != state.variables.state["bias"]).any())
    assert moved == [False, False, True, False, False, True]


def test_inputs_of_another_scale_are_treated_alike():
    scaled = biases(make=lambda i: {"x": 100 * jnp.asarray(batch(i))}, steps=3)[2]
    # The first biases are fractions of a norm that nobody has seen yet.
    fresh = SAE(D, F, rule=SPEC)
    for factor in (1, 100):
        optimiser = adam(0.0)
        state, take = init_state(fresh, optimiser, KEY), make_step(fresh, optimiser)
        for i in range(9):
            state, _ = take(state, {"x": factor * jnp.asarray(batch(i))})
        scaled.append(np.asarray(state.variables.state["bias"]))
    np.testing.assert_allclose(scaled[-2], scaled[-1], rtol=1e-4)
    assert scaled[-1].min() < -0.2


def test_the_encoder_is_the_dictionary_and_the_decoder_has_the_scales():
    sae = SAE(D, F, rule=SPEC)
    variables = start(sae, adam(0.0)).variables
    params = {**variables.params, "scale": jnp.linspace(0.5, 2, F)}
    weights = sae.weights(variables._replace(params=params))
    W = params["W_dec"]
    np.testing.assert_array_equal(weights.W_enc, W)
    np.testing.assert_array_equal(weights.W_dec, params["scale"][:, None] * W)
    np.testing.assert_array_equal(weights.b_enc, variables.state["bias"])


@pytest.mark.parametrize("form", ["jump", "shifted"])
def test_in_both_forms_another_library_needs_only_arrays(form):
    """ReLU with these four arrays; jump: thresholds `-b_enc`, and no other bias."""
    sae = SAE(D, F, rule=f"group_bias({form=})")
    variables = start(sae, adam(0.0)).variables
    variables = variables._replace(state={**variables.state, "unit": jnp.float32(3)})
    x = jnp.asarray(batch(0))
    W_enc, b_enc, W_dec, b_dec = sae.weights(variables)
    u = x @ W_enc.T
    plain = jax.nn.relu(u + b_enc) if form == "shifted" else u * (u > -b_enc)
    out = sae.apply(variables, x)
    np.testing.assert_allclose(to_dense(out.codes), plain, atol=1e-5)
    np.testing.assert_allclose(out.x_hat, plain @ W_dec + b_dec, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("groups=0", "groups=0 must be at least 1"),
        ("groups=17", "at most n_features=16"),
        ("every=0", "every=0 never adapts"),
        ("windows=0", "windows=0 keeps no rows"),
        ("highest=1e-4", "lowest=0.001 must be above 0 and at most highest=0.0001"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SAE(D, F, rule=f"group_bias({arguments})")


# Training on planted truth: 128 directions in 64 dimensions, three of them in each row,
# with equal weights, rows of norm 1, never the same twice; Adam with 1e-3, batches of
# 512. Bands leave slack around two measured seeds.


def triples(V, rng, n):
    which = rng.random((n, len(V))).argpartition(3)[:, :3]
    x = V[which].sum(1)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


def train(rule, V, rng, n_features, steps):
    sae, optimiser = SAE(V.shape[1], n_features, rule=rule), adam(1e-3)
    state = init_state(sae, optimiser, jax.random.key(int(rng.integers(2**31))))
    take = make_step(sae, optimiser, aux=None)
    for _ in range(steps):
        state, _ = take(state, {"x": triples(V, rng, 512)})
    return sae, state.variables


# Rule, features, bands of the share of directions that are found to a cosine of .9.
PLANTED = {
    "matched": ("group_bias(highest=0.0234, groups=1)", 512, (0.85, 1)),
    "below": ("group_bias(highest=0.01, groups=1)", 512, (0.85, 1)),
    "above": ("group_bias(highest=0.2, groups=1)", 512, (0, 0.3)),
    "groups": ("group_bias(highest=0.1, lowest=0.001, groups=5)", 640, (0.85, 1)),
    "groups above": ("group_bias(highest=0.5, lowest=0.2, groups=5)", 640, (0, 0.3)),
}


def frequencies(sae, variables, V, rng, n_rows=1_000_000, at_once=20_000):
    """How often each feature fires, on rows of which one in a million is seen."""
    fires = jax.jit(lambda x: (to_dense(sae.encode(variables, x)) != 0).sum(0))
    pieces = range(n_rows // at_once)
    return sum(np.asarray(fires(triples(V, rng, at_once))) for _ in pieces) / n_rows


def trained_on_triples(name, seed, steps):
    """Directions found, share of dead, and frequency over target, by group."""
    rule, n_features, _ = PLANTED[name]
    rng = np.random.default_rng(seed)
    V = rng.normal(size=(128, 64))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    sae, variables = train(rule, V, rng, n_features, steps)
    best = (V @ np.asarray(variables.params["W_dec"]).T).max(1)
    frequency = frequencies(sae, variables, V, rng)
    target = [
        bias_oracle.target(m, n_features, sae.bound.hp) for m in range(n_features)
    ]
    share, group = frequency / target, variables.state["group"]
    medians = [np.median(share[group == k]) for k in range(sae.bound.hp["groups"])]
    bias = np.asarray(variables.state["bias"])
    dead = (frequency < sae.bound.hp["dead_below"]).mean()
    found = [(best > least).mean() for least in (0.8, 0.9)]
    print(f"{name}, seed {seed}: found {found[0]:.3f} and {found[1]:.3f}, L0", end=" ")
    print(f"{frequency.sum():.1f}, dead {dead:.4f}, medians {np.round(medians, 2)}")
    assert -1 <= bias.min() <= bias.max() <= 0
    return found[1], dead, medians


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_directions_are_found_at_frequencies_like_theirs(name, seed):
    found, dead, medians = trained_on_triples(name, seed, 5000)
    low, high = PLANTED[name][2]
    assert low <= found <= high
    assert dead < 0.01
    assert max(medians) <= 1.1
    assert RULES["group_bias"].aux_k is False


# In 5,000 steps biases move a hundred times, by .01 of the largest pre-activation: not
# always enough. Of four more seeds for each rule, twenty runs, three miss a band: the
# rarest of five groups has a median of 1.51 (seed 2), and where all five targets are
# above the frequency 2.0 and 1.4 % of the features are dead (seeds 4 and 5).


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_after_twice_the_steps_every_band_holds(seed):
    found, dead, medians = trained_on_triples("groups", seed, 10_000)
    assert found >= 0.85
    assert dead < 0.01
    assert max(medians) <= 1.1
