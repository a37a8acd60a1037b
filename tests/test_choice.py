"""Mutual Choice and Feature Choice: budgets, ranks, thresholds, underused features."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import RULES, SAE, AuxK, over_batch, select, to_dense, zipf
from sae_jax.binding import bind, parse
from sae_jax.codes import Pairs
from sae_jax.training.terms import loss_terms, underused
from tests import oracles, zipf_oracles
from tests.contract import KEY, B, D, F, build, close, forward, rows

# Budgets


def given(k, n_rows, n_features, alpha, q):
    law = zipf.shares(n_features, alpha, q)
    return np.asarray(zipf.budgets(law, jnp.asarray(k) * n_rows, n_rows))


@pytest.mark.parametrize(("alpha", "q"), [(0, 0), (1, 0), (1.3, 0), (0.7, 5)])
def test_budgets_are_those_of_the_oracle_and_sum_to_the_whole(alpha, q, x64):
    sizes = itertools.product((0.3, 2.1, 7.9, 24), (1, 24, 500), (24, 600))
    for k, n_rows, n_features in sizes:
        found = given(k, n_rows, n_features, alpha, q)
        hp = {"k": k, "alpha": alpha, "q": q}
        assert found.tolist() == zipf_oracles.budgets(n_features, n_rows, hp)
        assert (np.diff(found) <= 0).all(), "who fires more gets more"
        assert abs(found.sum() - k * n_rows) <= n_features
        assert found.max() <= n_rows
        if k == n_features == 24:
            assert (found == n_rows).all()


def test_a_row_for_each_feature_can_exceed_the_budget():
    """Which is why k is not declared as one."""
    assert given(2.0, 8, 64, 1, 0).sum() > 64 > 2 * 8
    assert RULES["feature_choice"].budget is None
    assert RULES["mutual_choice"].budget == "k"


def positive(spec):
    """An SAE all of whose pre-activations are positive."""
    sae, variables = build(parse(spec))
    b_enc = jnp.full(F, 60.0)
    return sae, variables._replace(params={**variables.params, "b_enc": b_enc})


def test_every_feature_takes_as_many_rows_as_its_rank_allows():
    sae, variables = positive("feature_choice")
    firings = np.random.default_rng(0).integers(0, 9, F) / 4  # many are level
    state = {**variables.state, "firings": jnp.asarray(firings, jnp.float32)}
    variables = variables._replace(state=state)
    mask = jnp.arange(B) % 4 != 3
    for valid in (None, mask):
        n_rows = B if valid is None else int(mask.sum())
        out = forward(sae, variables, rows(), train=True, mask=valid)
        pre = np.asarray(out.encoder.pre, np.float64)
        pre = pre if valid is None else pre[np.asarray(mask)]
        active = to_dense(out.codes)
        active = active if valid is None else active[mask]
        hp = sae.bound.hp
        close(active, zipf_oracles.feature_choice(pre, hp, firings))
        by_rank = np.asarray(active > 0).sum(0)[zipf_oracles.by_rank(firings)]
        assert by_rank.tolist() == zipf_oracles.budgets(F, n_rows, hp)


def test_mutual_choice_spends_its_budget_on_the_largest():
    sae, variables = positive("mutual_choice")
    out = forward(sae, variables, rows(), train=True)
    active = to_dense(out.codes)
    assert (active > 0).sum() == 32 * B
    assert active[active > 0].min() >= out.encoder.pre[active == 0].max()


def test_a_batch_without_valid_rows_changes_no_rank():
    sae, variables = build(parse("feature_choice(k=4)"))
    out = forward(sae, variables, rows(), train=True, mask=jnp.zeros(B, bool))
    before, after = (zipf.ranks(s["firings"]) for s in (variables.state, out.state))
    np.testing.assert_array_equal(before, after)
    assert not to_dense(out.codes).any()


def test_few_of_many_features_are_sparse():
    sae = SAE(8, 2048, rule="feature_choice(k=16)")
    variables = sae.init(KEY)
    out = sae.forward(variables, rows(1, 512, 8), train=True)
    assert isinstance(out.codes, Pairs)
    dense = out.encoder.pre
    chosen = select.columns(dense, (to_dense(out.codes) > 0).sum(0), count_max=1 << 30)
    np.testing.assert_array_equal(to_dense(out.codes) > 0, chosen & (dense > 0))


# Memory


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice"])
def test_counts_and_thresholds_follow_the_oracle(name, x64):
    spec = f"{name}(k=3.5, threshold_decay=0.8, firings_decay=0.7)"
    sae = SAE(D, 12, rule=spec, dtype="float64")
    variables = sae.init(KEY)
    params = {n: np.asarray(p) for n, p in variables.params.items()}
    params["b_enc"] = np.where(np.arange(12) == 5, -1e3, 0.0)  # one that never fires
    variables = variables._replace(params=jax.tree.map(jnp.asarray, params))
    seen, firings, of_each = [], [0.0] * 12, name == "feature_choice"
    train = jax.jit(lambda v, x: sae.forward(v, x, train=True))
    held_out = np.asarray(rows(9), np.float64)
    for i in range(6):
        x = np.asarray(rows(i), np.float64)
        pre = oracles.preactivations(x, params)
        if of_each:
            seen.append(zipf_oracles.feature_choice(pre, sae.bound.hp, firings))
        else:
            seen.append(oracles.batch_topk(x, params, sae.bound.hp))
        firings = zipf_oracles.running_counts(seen, 0.7)
        out = train(variables, jnp.asarray(x))
        close(to_dense(out.codes), seen[-1], 1e-12)
        variables = variables._replace(state=out.state)
        close(out.state["firings"], firings, 1e-12)
        columns = [[c[:, j] for c in seen] for j in range(12)] if of_each else [seen]
        expected = [oracles.running_threshold(column, 0.8) for column in columns]
        close(over_batch.threshold(out.state), expected if of_each else expected[0])
        found = sae.encode(variables, jnp.asarray(held_out))
        close(found, oracles.threshold_codes(held_out, params, np.array(expected)))


def test_underused_features_are_those_of_the_oracle():
    rng = np.random.default_rng(2)
    for alpha, q, below in ((1.0, 0.0, 0.1), (0.0, 0.0, 0.5), (1.5, 3.0, 1.0)):
        firings = np.round(rng.pareto(0.7, F), 2)
        firings[::9] = 0
        hp = {"alpha": alpha, "q": q, "underused_below": below}
        found = zipf.underused({"firings": jnp.asarray(firings, jnp.float32)}, **hp)
        assert found.tolist() == zipf_oracles.underused(firings.tolist(), hp)
        assert found[::9].all()
        assert not found.all()
    for alike in (0.0, 3.0):
        assert not zipf.underused({"firings": jnp.full(F, alike)}).any()


# What the auxiliary loss revives


def test_the_auxiliary_loss_takes_dead_and_underused_features():
    """Of a user's rule too: the contract says it, no rule is named."""
    sae, variables = build(parse("toy_tired"))
    rate = jnp.where(jnp.arange(F) < 6, 0.001, 0.5)
    variables = variables._replace(state={"rate": rate})
    weak = underused(sae.bound, variables.state, None)
    assert weak.sum() == 6
    aux, idle = AuxK(k=4, coef=0.4, dead_after=5), jnp.where(jnp.arange(F) == 40, 9, 0)

    def value(params):
        given = variables._replace(params=params)
        out = forward(sae, given, rows(), train=True)
        terms = loss_terms(out, None, idle, aux, underused=weak)
        return terms["aux"], out

    (found, out), grads = jax.value_and_grad(value, has_aux=True)(variables.params)
    taken = np.asarray(weak) | (np.arange(F) == 40)
    residual = np.asarray(out.target - out.x_hats[-1])
    expected = oracles.aux_k(
        *(np.asarray(out.encoder.pre), taken),
        *(np.asarray(variables.params["W_dec"]), residual, 4, 0.4, False),
    )
    close(found, expected)
    assert (grads["W_dec"][taken] != 0).any(1).all()
    assert not grads["W_dec"][~taken].any()
    assert loss_terms(out, None, idle, aux)["aux"] != found


def stepped(spec, n=3, **options):
    sae, optimiser = SAE(D, F, rule=spec), sae_jax.adam(1e-2)
    state = sae_jax.init_state(sae, optimiser, KEY)
    step = sae_jax.make_step(sae, optimiser, **options)
    for i in range(n):
        state, metrics = step(state, {"x": rows(i)})
    return state, metrics


def test_a_step_revives_underused_features_though_none_is_dead():
    aux = AuxK(dead_after=99)
    spec = "mutual_choice(k=2.0, underused_below={})"
    found = {below: stepped(spec.format(below), aux=aux) for below in (0, 0.1, 1.0)}
    assert found[0][1]["loss_aux"] == 0
    assert 0 < found[0.1][1]["loss_aux"] <= found[1.0][1]["loss_aux"]
    pieces = stepped(spec.format(1.0), aux=aux, accumulate=2)[1]
    assert pieces["loss_aux"] > 0


def test_mutual_choice_without_underused_features_is_batch_topk():
    mutual, plain = (
        stepped(spec, n=5, aux=AuxK(dead_after=2))
        for spec in ("mutual_choice(k=4.0, underused_below=0)", "batch_topk(k=4.0)")
    )
    params = [state.variables.params for state, _ in (mutual, plain)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    for name, value in plain[0].variables.state.items():
        np.testing.assert_array_equal(mutual[0].variables.state[name], value)


@pytest.mark.parametrize("start", [0.5, 1.0])
def test_underused_features_may_depend_on_a_knob_that_moves(start):
    """Whose value in the first step is 0.25 or 0.5."""

    def few(state, *, cost: float | jax.Array = 0.5):
        return jnp.full(F, cost > 0.4)

    rule = dataclasses.replace(RULES["toy_tired"], underused=few)
    knob = sae_jax.Knob(start=start, steps=100)
    aux = AuxK(dead_after=99)
    _, metrics = stepped(bind(rule, {"cost": 0.5}), n=1, aux=aux, knob=knob)
    assert metrics["knob"] == 0.5 * start
    assert bool(metrics["loss_aux"] > 0) == (start == 1)
