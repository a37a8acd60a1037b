"""Worlds of planted features hold what they say, by counting."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from experiments import _worlds
from experiments._worlds import WORLDS, Planted

PLANTED = Planted(width=16, features=21, l0=2.5)  # one of which no tree has
N_ROWS = 40_000


def world_and_rows(name, planted=PLANTED, seed=0):
    world = _worlds.make(name, planted, jax.random.key(seed))
    rows = jax.jit(_worlds.draw, static_argnums=2)(world, jax.random.key(9), N_ROWS)
    return world, np.asarray(rows.x, np.float64), np.asarray(rows.codes)


def within(found, expected, n=N_ROWS):
    """Shares of rows, five standard deviations of a count apart at most."""
    room = 5 * np.sqrt(np.maximum(expected * (1 - np.asarray(expected)), 1e-4) / n)
    assert (np.abs(found - expected) < room).all(), (found, expected)


@pytest.mark.parametrize("name", WORLDS)
def test_features_are_on_as_often_as_is_said_and_sum_to_l0(name):
    world, x, codes = world_and_rows(name)
    expected = np.asarray(_worlds.frequencies(world))
    np.testing.assert_allclose(expected.sum(), PLANTED.l0, rtol=1e-6)
    within((codes > 0).mean(0), expected)
    n_on = (codes > 0).sum(1)
    assert abs(n_on.mean() - PLANTED.l0) < 5 * n_on.std() / np.sqrt(N_ROWS)
    assert ((codes == 0) | ((codes >= 0.5) & (codes <= 1.5))).all()
    np.testing.assert_allclose(codes[codes > 0].mean(), 1, atol=0.01)
    np.testing.assert_allclose(np.square(world.directions).sum(1), 1, rtol=1e-6)
    rest = x - codes @ np.asarray(world.directions, np.float64)
    if name == "noisy":  # 0.3^2 of 2.5 features with a mean square of 13/12
        square = 0.09 * 2.5 * 13 / 12
        np.testing.assert_allclose(np.square(rest).sum(1).mean(), square, rtol=0.02)
        cov = np.cov(rest.T)
        np.testing.assert_allclose(cov, np.eye(16) * square / 16, atol=1e-3)
    else:
        np.testing.assert_allclose(rest, 0, atol=2e-6)


def test_zipf_frequencies_fall_by_the_rank():
    found = np.asarray(_worlds.frequencies(world_and_rows("zipf")[0]))
    np.testing.assert_allclose(found / found[0], np.arange(1, 22) ** -0.7, rtol=1e-6)


@pytest.mark.parametrize("name", ["equal", "correlated"])
def test_only_features_of_one_correlated_group_are_on_together(name):
    _, _, codes = world_and_rows(name)
    on = (codes > 0).astype(float)
    together = on.T @ on / N_ROWS
    p = PLANTED.l0 / PLANTED.features
    cut, c = norm.ppf(p), PLANTED.correlation * (name == "correlated")
    pair = multivariate_normal([0, 0], [[1, c], [c, 1]]).cdf([cut, cut])
    assert pair > 4 * p**2 or name == "equal"
    groups = np.arange(21) // 4
    same, apart = groups[:, None] == groups, np.ones((21, 21), bool)
    np.fill_diagonal(same, False)
    np.fill_diagonal(apart, False)
    within(together[same], pair)
    within(together[apart & ~same], p**2)


def test_a_child_is_on_only_where_its_parent_is():
    _, _, codes = world_and_rows("hierarchical")
    on = codes > 0
    # 5 parents of 3 children each, and one that is alone.
    for child in range(5, 20):
        parent = (child - 5) // 3
        assert on[:, child].any()
        assert (on[:, parent] | ~on[:, child]).all()
        given = on[on[:, parent], child]
        within(given.mean(), PLANTED.share, len(given))
    often = PLANTED.l0 / (6 + 15 * PLANTED.share)
    within(on[:, [0, 1, 2, 3, 4, 20]].mean(0), often)
    # Siblings are independent of one another, given their parent.
    of_first = on[on[:, 0]]
    both = (of_first[:, 5] & of_first[:, 6]).mean()
    within(both, PLANTED.share**2, len(of_first))


def test_rows_follow_from_the_key():
    world, x, _ = world_and_rows("equal")
    again = _worlds.draw(world, jax.random.key(9), N_ROWS).x
    np.testing.assert_allclose(again, x, atol=1e-5)
    other = np.asarray(_worlds.draw(world, jax.random.key(8), 100).x)
    assert not np.allclose(other, x[:100])
    elsewhere = _worlds.make("equal", PLANTED, jax.random.key(1))
    assert not np.allclose(elsewhere.directions, world.directions)


def test_gradients_are_those_of_a_cross_entropy():
    world, x, _ = world_and_rows("equal")
    x, key = x[:50].astype(np.float32), jax.random.key(4)
    found = np.asarray(_worlds.gradients(world, key, x))
    readout = np.asarray(world.readout, np.float64)
    logits = x @ readout.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    labels = np.asarray(jax.random.categorical(key, logits.astype(np.float32)))
    one_hot = np.eye(_worlds.CLASSES)[labels]
    np.testing.assert_allclose(found, (p - one_hot) @ readout, atol=2e-5)
    assert len({*labels}) > 3


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"width": 0}, "width=0 must be at least 1"),
        ({"features": 1, "l0": 0.5}, "features=1 must be at least 2"),
        ({"correlation": 1.5}, "correlation=1.5 must be from 0 to 1"),
        ({"noise": -1.0}, "noise=-1.0 must not be negative"),
        ({"l0": 0.0}, "l0=0.0 must be above 0 and at most features=21"),
        ({"l0": 22.0}, "l0=22.0 must be above 0 and at most features=21"),
    ],
)
def test_what_cannot_be_planted_is_said(change, fault):
    [said] = dataclasses.replace(PLANTED, **change).faults()
    assert fault in said


def test_a_world_whose_chances_would_pass_one_is_refused():
    assert [*_worlds.faults("zipf", PLANTED)] == []
    steep = dataclasses.replace(PLANTED, exponent=3.0)
    [said] = _worlds.faults("zipf", steep)
    assert "of the world zipf to be on in 2.08 of the rows" in said
    [said] = _worlds.faults("hierarchical", dataclasses.replace(PLANTED, l0=15.0))
    assert "of the world hierarchical" in said
