"""The step: order of its parts, schedules, counters, metrics, messages."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import (
    SAE,
    AuxK,
    Knob,
    Rule,
    adam,
    from_pre,
    init_state,
    learning_rate,
    make_step,
    require_finite,
    to_dense,
)
from sae_jax.codes import fired, l0
from sae_jax.training import revival
from sae_jax.training.optim import clipping, project, unit_rows
from sae_jax.training.terms import loss_terms
from tests import oracles
from tests.compilations import compilations
from tests.contract import rows

KEY = jax.random.key(0)


def run(sae, steps=5, optimiser=None, n=24, **options):
    optimiser = optimiser or adam(1e-2)
    state, history = init_state(sae, optimiser, KEY), []
    take = make_step(sae, optimiser, **options)
    for i in range(steps):
        state, metrics = take(state, {"x": rows(i, n)})
        history.append(jax.device_get(metrics))
    return state, history


def row_norms(state):
    return jnp.linalg.norm(state.variables.params["W_dec"], axis=1)


def test_decoder_rows_are_unit_after_the_step_or_before_or_never():
    sae = SAE(16, 64, rule="relu")
    assert abs(row_norms(run(sae, decoder_norm="after")[0]) - 1).max() < 1e-6
    before = abs(row_norms(run(sae, decoder_norm="before")[0]) - 1).max()
    assert 1e-5 < before < 0.05, "off by one step"
    assert abs(row_norms(run(sae, 20, decoder_norm="free")[0]) - 1).max() > 0.05


def test_gradients_are_projected_before_they_are_clipped():
    """Clipped after: the norm that the optimiser sees is the limit itself."""

    def spy(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), updates

    catch = optax.GradientTransformation(lambda params: params, spy)
    chain = optax.chain(optax.clip_by_global_norm(1e-3), catch)
    sae = SAE(16, 64, rule="relu")
    take = make_step(sae, chain, jit=False)
    state, _ = take(init_state(sae, chain, KEY), {"x": rows()})
    seen = state.opt_state[1]
    np.testing.assert_allclose(optax.tree.norm(seen), 1e-3, rtol=1e-5)
    W_dec = sae.init(jax.random.split(KEY)[0]).params["W_dec"]
    along = (seen["W_dec"] * W_dec).sum(1)
    assert abs(along).max() < 1e-8


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 40.0])
def test_clipping_is_that_of_optax(norm):
    grads = {"W": rows(), "b": jnp.arange(3.0)}
    grads = jax.tree.map(lambda g: g * norm / optax.tree.norm(grads), grads)
    grads["half"] = jnp.zeros(2, jnp.bfloat16)
    found, expected = (
        rule.update(grads, rule.init(grads))[0]
        for rule in (clipping(1.0), optax.clip_by_global_norm(1.0))
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_projecting_clipping_and_normalising_keep_no_copies_of_matrices():
    """Two gradients are all that a step has beside its state, but for small parts."""
    sae, x = SAE(256, 4096, "relu"), jax.ShapeDtypeStruct((8, 256), jnp.float32)

    def matrices(clip):
        optimiser = optax.chain(clip, optax.adam(1e-3))
        state = jax.eval_shape(lambda: init_state(sae, optimiser, KEY))
        step = make_step(sae, optimiser).lower(state, {"x": x}).compile()
        return step.memory_analysis().temp_size_in_bytes / (4 * 256 * 4096)

    assert matrices(optax.clip_by_global_norm(1.0)) > 3.9
    assert matrices(clipping(1.0)) < 2.3
    assert matrices(optax.identity()) < 2.2


def test_projection_and_normalisation_leave_other_parameters_alone():
    params = {"W_dec": jnp.zeros((3, 2)).at[0].set(2.0), "other": jnp.ones(2)}
    assert not jnp.isnan(unit_rows(params)["W_dec"]).any(), "a row of zeros stays one"
    grads = jax.tree.map(jnp.ones_like, params)
    projected = project(grads, params)
    np.testing.assert_array_equal(projected["other"], 1)
    np.testing.assert_array_equal(projected["W_dec"][1:], 1)


def test_decoder_rows_are_divided_by_their_norms_or_stay_to_the_bit():
    W_dec = np.random.default_rng(0).normal(size=(300, 3))
    W_dec[[5, 150]] = 0
    norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
    params = {"W_dec": jnp.asarray(W_dec, jnp.float32)}
    for go in (True, jnp.array(True)):
        found = unit_rows(params, where=go)["W_dec"]
        np.testing.assert_allclose(found, W_dec / np.where(norms, norms, 1), rtol=1e-6)
    kept = unit_rows(params, where=jnp.array(False))
    np.testing.assert_array_equal(kept["W_dec"], params["W_dec"])


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_learning_rate_warms_up_and_decays(decay):
    schedule = learning_rate(2.0, 110, warmup=10, decay=decay)
    half = {"constant": 2.0, "cosine": 1.0, "linear": 1.0}[decay]
    end = {"constant": 2.0, "cosine": 0.0, "linear": 0.0}[decay]
    found = [float(schedule(i)) for i in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(found, [0, 1, 2, half, end], atol=1e-6)
    assert float(learning_rate(2.0, 100)(0)) == 2


def test_loss_is_the_sum_of_its_terms():
    _, history = run(SAE(16, 64, rule="gated"), aux=AuxK(k=4, dead_after=1))
    for metrics in history:
        terms = [value for name, value in metrics.items() if name.startswith("loss_")]
        assert len(terms) == 4
        np.testing.assert_allclose(metrics["loss"], sum(terms), rtol=1e-6)


def test_idle_features_are_counted_and_then_revived():
    """Ten features that never win are counted, and learn once AuxK sees them."""
    sae = SAE(16, 64, rule="topk(k=4)")
    variables = sae.init(KEY)
    W_enc = variables.params["W_enc"].at[:10].multiply(0.01)
    variables = variables._replace(params={**variables.params, "W_enc": W_enc})
    optimiser = adam(1e-2)
    for dead_after, coef in ((3, 1.0), (99, 1.0)):
        state = init_state(sae, optimiser, KEY, variables=variables)
        take = make_step(sae, optimiser, aux=AuxK(8, coef, dead_after))
        for i in range(6):
            state, metrics = take(state, {"x": rows(i)})
            idle = int(state.steps_idle[:10].min())
            if i < 2:
                assert idle == i + 1
                assert metrics["dead"] == 0
        moved = abs(state.variables.params["W_enc"] - W_enc)[:10].max()
        assert (moved > 0) == (dead_after == 3)
        assert (metrics["loss_aux"] > 0) == (dead_after == 3)


def about_to_die(optimiser, dead_after=3):
    """A state in which eleven features die in the next step, one of them for good.

    They never win; of the first of them even AuxK can make nothing.
    """
    sae = SAE(16, 64, rule="topk(k=4)")
    params = sae.init(KEY).params
    params["W_enc"] = params["W_enc"].at[30:41].multiply(0.01)
    params["b_enc"] = params["b_enc"].at[30].set(-50.0).at[33].set(0.02)
    variables = sae.init(KEY)._replace(params=params)
    state = init_state(sae, optimiser, KEY, variables=variables)
    idle = jnp.where((jnp.arange(64) >= 30) & (jnp.arange(64) < 41), dead_after - 1, 0)
    return sae, params, dataclasses.replace(state, steps_idle=idle.astype(jnp.int32))


every_aux_k = pytest.mark.parametrize(
    ("k", "masked", "normalise"),
    list(itertools.product((13, 5), (False, True), (False, True))),
)


@every_aux_k
def test_aux_k_counts_from_the_step_in_which_features_die(
    monkeypatch, k, masked, normalise
):
    monkeypatch.setattr(revival, "ROWS_AT_ONCE", 8)
    optimiser = optax.sgd(0.0)
    sae, params, state = about_to_die(optimiser)
    valid = np.arange(24) != 5 if masked else np.full(24, True)
    batch = {"x": rows()} | ({"mask": jnp.asarray(valid)} if masked else {})
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    aux = AuxK(k, 1.0, 3, normalise)
    _, metrics = make_step(sae, optimiser, aux=aux)(state, batch)
    assert metrics["dead"] == 11
    x = np.asarray(rows(), np.float64)[valid]
    pre = oracles.preactivations(x, params)
    codes = oracles.topk(x, params, {"k": 4})
    residual = x - oracles.reconstruct(codes, params)
    dead = (np.arange(64) >= 30) & (np.arange(64) < 41)
    expected = oracles.aux_k(pre, dead, params["W_dec"], residual, k, 1.0, normalise)
    np.testing.assert_allclose(metrics["loss_aux"], expected, rtol=1e-5)


def test_gradients_are_the_same_for_few_dead_features_as_for_many():
    """With k=11 all that are dead are taken as they are, with k=10 the strongest."""
    found, optimiser = [], optax.sgd(1.0)
    for k in (11, 10):
        sae, before, state = about_to_die(optimiser)
        take = make_step(sae, optimiser, aux=AuxK(k, 1.0, 3), decoder_norm="free")
        after = take(state, {"x": rows()})[0].variables.params
        found.append(jax.tree.map(lambda a, b: np.asarray(a - b), after, before))
    assert np.abs(found[0]["W_enc"][31:41]).max(1).min() > 1e-4, "all but one learn"
    assert not found[0]["W_enc"][30].any()
    for name, gradient in found[0].items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-5 * size)


@every_aux_k
def test_aux_k_after_the_other_terms_is_what_it_is_among_them(
    monkeypatch, k, masked, normalise
):
    """Whole gradients of a step, against those of one function of all terms."""
    monkeypatch.setattr(revival, "ROWS_AT_ONCE", 8)
    aux, optimiser = AuxK(k, 1.0, 3, normalise), optax.sgd(1.0)
    sae, before, state = about_to_die(optimiser)
    mask = jnp.arange(24) % 5 != 2 if masked else None
    batch = {"x": rows()} | ({"mask": mask} if masked else {})
    idle, variables = state.steps_idle + 1, jax.tree.map(jnp.copy, state.variables)

    def together(params):
        given = variables._replace(params=params)
        out = sae.forward(given, rows(), mask=mask, train=True)
        dead = jnp.where(fired(out.codes, mask), 0, idle)
        return sum(loss_terms(out, mask, dead, aux).values())

    loss, expected = jax.value_and_grad(together)(variables.params)
    take = make_step(sae, optimiser, aux=aux, decoder_norm="free")
    state, metrics = take(state, batch)
    assert metrics["loss_aux"] > 0
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    for name, gradient in expected.items():
        found = before[name] - state.variables.params[name]
        np.testing.assert_allclose(found, gradient, atol=1e-6 * np.abs(gradient).max())


def test_aux_k_is_on_by_default_where_the_rule_says_so():
    assert "loss_aux" in run(SAE(16, 64, rule="topk(k=4)"), 1)[1][0]
    assert "loss_aux" not in run(SAE(16, 64, rule="relu"), 1)[1][0]
    assert "loss_aux" not in run(SAE(16, 64, rule="topk(k=4)"), 1, aux=None)[1][0]


def test_a_ramp_moves_the_knob_to_its_value():
    _, history = run(SAE(16, 64, rule="topk(k=4)"), 8, knob=Knob(start=3.0, steps=4))
    assert [m["knob"] for m in history] == [12, 10, 8, 6, 4, 4, 4, 4]
    assert [m["l0"] for m in history] == [12, 10, 8, 6, 4, 4, 4, 4]
    warm = run(SAE(16, 64, rule="relu(coef=0.5)"), 6, knob=Knob(start=0.0, steps=4))[1]
    shares = [m["loss_l1"] for m in warm]
    assert shares[0] == 0
    assert all(a < b for a, b in itertools.pairwise(shares[:5]))


@pytest.mark.parametrize(
    ("rule", "rate"), [("relu(coef=0.05)", 0.02), ("topk(k=20)", 0.02)]
)
def test_control_steers_towards_the_target_l0(rule, rate):
    sae = SAE(16, 64, rule=rule)
    optimiser = adam(3e-3)
    knob = Knob(target_l0=8.0, rate=rate)
    state = init_state(sae, optimiser, KEY)
    take = make_step(sae, optimiser, knob=knob)
    l0 = []
    with compilations("step") as compiled:
        for i in range(400):
            state, metrics = take(state, {"x": rows(i % 16, 64)})
            l0.append(float(metrics["l0"]))
    assert l0[0] > 15
    assert abs(np.mean(l0[-50:]) - 8) < 1.5, np.mean(l0[-50:])
    assert len(compiled) == 1
    # The SAE that comes out of training is as sparse as training had become.
    settled = knob.reached(sae, state.step, state.control)
    evaluated = to_dense(settled.encode(state.variables, rows(0, 64)))
    assert abs((evaluated != 0).sum(1).mean() - 8) < 1.5
    if sae.bound.rule.budget:
        before = to_dense(sae.encode(state.variables, rows(0, 64)))
        assert (before != 0).sum(1).mean() > 15, "its spec still says k=20"


def test_control_does_not_wind_up_past_what_can_be_reached():
    sae = SAE(16, 64, rule="topk(k=32)")
    state, history = run(sae, 60, knob=Knob(target_l0=60.0, rate=0.1))
    assert history[-1]["knob"] == 64
    assert state.control <= 2


def shifted(pre, *, by: float = 0.1):
    return jax.nn.relu(pre - by)


UNTRACED = Rule("shifted", "", "", encode=from_pre(shifted), example={}, knob="by")


def test_knobs_that_cannot_move_are_refused():
    with pytest.raises(ValueError, match="depends on the data"):
        make_step(SAE(16, 64, rule="top_afa"), adam(1e-3), knob=Knob(target_l0=8.0))
    with pytest.raises(ValueError, match="from coef=0, since control multiplies"):
        make_step(
            SAE(16, 64, rule="relu(coef=0)"), adam(1e-3), knob=Knob(target_l0=8.0)
        )
    with pytest.raises(ValueError, match="may not be traced; if the rule can bear"):
        make_step(SAE(16, 64, rule=UNTRACED), adam(1e-3), knob=Knob(2.0, 5))
    with pytest.raises(ValueError, match="needs steps"):
        Knob(start=2.0)
    with pytest.raises(ValueError, match="asks for empty codes"):
        Knob(target_l0=0.0)


@pytest.mark.parametrize(("k", "n"), [(2.1, 100), (0.3, 10), (3.2, 256), (0.01, 32)])
def test_a_fractional_budget_is_the_same_traced_or_not(k, n):
    sae = SAE(16, 64, rule=f"batch_topk(k={k})")
    variables = sae.init(KEY)
    counts = [
        int(l0(sae.forward(variables, rows(0, n), train=True, **knob).codes).sum())
        for knob in ({}, {"knob": jnp.float32(k)})
    ]
    assert counts == [max(1, int(k * n + 1e-9))] * 2


def test_masked_rows_may_hold_anything():
    sae, optimiser = SAE(16, 64, rule="topk(k=4)"), adam(1e-3)
    take = make_step(sae, optimiser)
    mask = jnp.arange(24) != 5
    results = []
    for value in (0.0, jnp.nan, jnp.inf):
        x = rows().at[5].set(value)
        state, metrics = take(init_state(sae, optimiser, KEY), {"x": x, "mask": mask})
        require_finite(metrics)
        results.append(state.variables.params)
        assert jnp.isfinite(sae.forward(state.variables, x, mask=mask).x_hats[-1]).all()
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    jax.tree.map(np.testing.assert_array_equal, results[0], results[2])


def test_a_batch_without_valid_rows_counts_for_nothing():
    sae, optimiser = SAE(16, 64, rule="topk(k=4)"), adam(1e-3)
    batch = {"x": rows(), "mask": jnp.zeros(24, bool)}
    state, metrics = make_step(sae, optimiser)(init_state(sae, optimiser, KEY), batch)
    assert metrics["loss"] == 0
    assert not state.steps_idle.any()


@pytest.mark.parametrize("rule", ["batch_topk(k=4)", "matryoshka(k=4)"])
def test_a_batch_without_valid_rows_leaves_the_threshold_alone(rule):
    sae, optimiser = SAE(16, 64, rule=rule), adam(1e-3)
    state = init_state(sae, optimiser, KEY)
    state.variables.params["b_enc"] += 1  # rows of zeros have positive features
    batch = {"x": rows(), "mask": jnp.zeros(24, bool)}
    left = make_step(sae, optimiser)(state, batch)[0].variables.state
    assert not any(map(float, left.values()))


def test_any_optimiser_of_optax_will_do():
    """Some share buffers between their memory and the parameters."""
    sae, optimiser = SAE(16, 64, rule="relu"), optax.contrib.prodigy()
    state, take = init_state(sae, optimiser, KEY), make_step(sae, optimiser)
    for i in range(2):
        state, metrics = take(state, {"x": rows(i)})
    assert metrics["finite"]


def test_an_ensemble_of_steps_equals_its_members():
    sae, optimiser = SAE(16, 64, rule="topk(k=4)"), adam(1e-2)
    take = make_step(sae, optimiser, jit=False)
    states = [init_state(sae, optimiser, jax.random.key(i)) for i in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    batch = {"x": rows()}
    together, _ = jax.jit(jax.vmap(take, in_axes=(0, None)))(together, batch)
    for i, state in enumerate(states):
        alone, _ = jax.jit(take)(state, batch)
        member = jax.tree.map(lambda leaf, i=i: leaf[i], together.variables.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            member,
            alone.variables.params,
        )


def test_a_run_compiles_once_with_schedules_masks_and_new_values():
    chex.clear_trace_counter()
    sae = SAE(16, 64, rule="batch_topk(k=4.0)")
    optimiser = adam(learning_rate(1e-3, 50, warmup=5, decay="cosine"))
    plain = make_step(sae, optimiser, knob=Knob(2.0, 10), jit=False)
    take = jax.jit(chex.assert_max_traces(plain, n=1), donate_argnums=0)
    state = init_state(sae, optimiser, KEY)
    for i in range(20):
        mask = jnp.arange(24) < 24 - i % 5
        state, metrics = take(state, {"x": rows(i), "mask": mask})
    assert int(metrics["step"]) == 19
    assert metrics["finite"]


def test_the_step_reuses_the_buffers_of_its_state_but_not_the_callers():
    sae, optimiser = SAE(16, 64, rule="relu"), adam(1e-3)
    variables = sae.init(KEY)
    state = init_state(sae, optimiser, KEY, variables=variables)
    make_step(sae, optimiser)(state, {"x": rows()})
    assert state.variables.params["W_enc"].is_deleted()
    assert not variables.params["W_enc"].is_deleted()


def test_steps_draw_new_random_numbers_from_key_and_step_alone():
    sae, optimiser = SAE(16, 64, rule="variational(k=4)"), adam(0.0)
    take = make_step(sae, optimiser)
    l0 = []
    for start in (0, 0, 1):
        state = init_state(sae, optimiser, KEY)
        state = dataclasses.replace(state, step=jnp.int32(start))
        l0.append(float(take(state, {"x": rows()})[1]["loss"]))
    assert l0[0] == l0[1] != l0[2]


def test_transcoders_train():
    sae = SAE(16, 64, rule="topk(k=8)", d_out=12)
    optimiser = adam(1e-2)
    state, take = init_state(sae, optimiser, KEY), make_step(sae, optimiser)
    matrix = jax.random.normal(KEY, (16, 12))
    for i in range(200):
        x = rows(i % 16, 64)
        state, metrics = take(state, {"x": x, "target": x @ matrix})
        if i == 0:
            first = metrics["nmse"]
    assert metrics["nmse"] < 0.6 * first


def test_a_step_that_is_not_finite_is_reported_with_its_number():
    sae, optimiser = SAE(16, 64, rule="relu"), adam(1e-3)
    state, take = init_state(sae, optimiser, KEY), make_step(sae, optimiser)
    state, metrics = take(state, {"x": rows()})
    require_finite(metrics)
    _, metrics = take(state, {"x": rows().at[0, 0].set(jnp.nan)})
    with pytest.raises(FloatingPointError, match=r"Step 1 gave loss=nan.*lower the"):
        require_finite(metrics)


@pytest.mark.usefixtures("as_users")
def test_bad_training_options_are_refused_with_the_remedy():
    sae, optimiser = SAE(16, 64, rule="relu"), adam(1e-3)
    take, state = make_step(sae, optimiser), init_state(sae, optimiser, KEY)
    with pytest.raises(ValueError, match="Unknown entry of a batch 'targets'"):
        take(state, {"x": rows(), "targets": rows()})
    with pytest.raises(ValueError, match="decoder_norm='afterwards' must be one of"):
        make_step(sae, optimiser, decoder_norm="afterwards")
    with pytest.raises(ValueError, match="warmup=20 is longer than the run"):
        learning_rate(1e-3, 10, warmup=20)
    with pytest.raises(ValueError, match=r"lr=nan must be finite"):
        learning_rate(float("nan"), 10)
    with pytest.raises(ValueError, match="b1=-1 must be finite and not negative"):
        adam(1e-3, b1=-1)
    with pytest.raises(ValueError, match="pass aux=None"):
        AuxK(k=0)
    with pytest.raises(ValueError, match="pass aux=None"):
        AuxK(dead_after=0)
    with pytest.raises(ValueError, match="aux='defautl' must be"):
        make_step(sae, optimiser, aux="defautl")
    with pytest.raises(ValueError, match="A batch needs 'x'"):
        take(state, {"mask": jnp.ones(24, bool)})
    with pytest.raises(ValueError, match="Unknown loss term 'msee'"):
        make_step(sae, optimiser, loss_dtypes={"msee": "float32"})(state, {"x": rows()})
    with pytest.raises(ValueError, match="AuxK coef=-1 must be"):
        AuxK(coef=-1)


def test_a_users_rule_trains_from_its_spec_string_like_any_other():
    state, history = run(SAE(16, 64, rule="toy_scaled(coef=0.001)"), 60)
    assert history[-1]["nmse"] < 0.7 * history[0]["nmse"]
    assert "loss_sum" in history[0]
    assert (state.variables.params["scale"] != 1).any()
    assert sae_jax.RULES["toy_scaled"].decides.startswith("sign")
