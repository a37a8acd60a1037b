"""Circuits by discrete codes: scores by oracles, planted heads, heads of a model."""

import numpy as np
import pytest

from experiments import _repeating_lm as repeating
from experiments._planted_heads import codes_of, plant
from experiments.circuits import contrast
from sae_jax.analysis import circuits, heads
from sae_jax.analysis.circuits import NONE, discrete, overlap
from sae_jax.analysis.ranking import auroc, f1
from tests.toys import toy_lm

RULE = "relu(coef=0.02)"


def score(positive, negative):
    """Of one head or pair, symbol by symbol."""
    symbols = [*positive, *negative]
    different = [s for i, s in enumerate(symbols) if s not in symbols[:i]]
    only = [s for s in different if s in positive and s not in negative]
    return len(only) / len(different)


def test_a_score_is_the_share_of_codes_that_only_positive_prompts_have():
    assert overlap({1, 2, 3}, {3, 4}) == 0.5
    assert overlap({1, 2}, {1, 2}) == 0
    assert overlap({1}, {1, 2, 3}) == 0  # what only the negative have is no sign
    assert overlap(set(), set()) == 0


def test_nodes_and_edges_are_those_of_slow_loops():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(-1, 4, (7, 5)), rng.integers(-1, 4, (9, 5))
    found = circuits.scores(positive, negative)
    for i in range(5):
        ours = [part[:, i].tolist() for part in (positive, negative)]
        assert found.nodes[i] == score(*ours)
        assert found.edges[i, i] == 0
        for j in set(range(5)) - {i}:
            pairs = [part[:, [i, j]].tolist() for part in (positive, negative)]
            assert found.edges[i, j] == score(*pairs)
    same = circuits.scores(positive, positive[::-1])
    assert (same.nodes == 0).all()
    assert (same.edges == 0).all()


def test_codes_that_are_all_zero_have_a_symbol_of_their_own():
    codes = np.array([[0.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    assert discrete(codes).tolist() == [NONE, 0, 2]
    # As feature 0 it would look like the second row.
    one = circuits.scores(discrete(codes[:1])[:, None], discrete(codes[1:2])[:, None])
    assert one.nodes.tolist() == [0.5]


def test_ties_count_half_and_f1_of_nothing_is_0():
    assert auroc(np.array([0.5, 0.5]), np.array([0.5, 0.5, 0.5])) == 0.5
    assert auroc(np.array([1.0, 0.0]), np.array([0.0])) == 0.75
    none, some = np.zeros(3, bool), np.array([True, True, False])
    assert f1(none, none) == 0
    assert f1(some, np.array([True, False, True])) == 0.5


def test_thresholds_are_for_scores_or_for_shares_of_a_softmax():
    nodes = np.log(np.array([1.0, 2.0, 5.0]))
    assert circuits.chosen(nodes, np.log(2.0)).tolist() == [False, True, True]
    shares = circuits.chosen(nodes, 0.3, softmax=True)
    assert shares.tolist() == [False, False, True]


def test_a_circuit_is_held_against_scores():
    circuit = np.array([True, True, False, False])
    nodes = np.array([0.5, 0.2, 0.2, 0.0])
    edges = np.zeros((4, 4))
    edges[0, 1] = edges[1, 0] = 0.3
    edges[2, 3] = edges[3, 2] = 0.4
    found = circuits.found(circuits.Scores(nodes, edges), circuit)
    assert found == circuits.Found(3.5 / 4, 4 / 5, 2 / 3)
    all_in = circuits.found(circuits.Scores(nodes, edges), np.ones(4, bool))
    assert np.isnan(all_in[:2]).all()


def test_prompts_of_kinds_drawn_by_lot_know_no_circuit():
    """Where the kinds tell the circuit perfectly."""
    rng = np.random.default_rng(0)
    circuit = np.arange(20) < 8
    positive, negative = rng.integers(5, size=(2, 30, 20))
    positive[:, circuit] += 100
    own = circuits.found(circuits.scores(positive, negative), circuit)
    assert own.node_auc == 1
    chance = circuits.shuffled(positive, negative, circuit, times=20)
    assert chance.node_auc < 0.85  # more symbols there, so that more are missed


def test_vectors_are_standardised_over_all_heads_and_prompts():
    rng = np.random.default_rng(0)
    held = rng.normal(2, 3, size=(5, 4, 6)).astype(np.float32)
    held[..., 3] = 7
    rows = circuits.standardised(held)
    assert rows.shape == (20, 6)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.delete(rows.std(0), 3), 1, rtol=1e-5)
    assert (rows[:, 3] == 0).all()


def tokens(n=4, length=3):
    block = repeating.blocks(np.random.default_rng(0), n, length, 64)
    return repeating.after(block, block)


def test_outputs_and_patterns_are_those_of_the_models_attention():
    """Queries, keys and values of the model, position by position."""
    lm = toy_lm()
    held, seen = heads.outputs(lm, tokens()), heads.patterns(lm, tokens())
    assert held.shape == (4, 7, 4, 8)
    name = "transformer.h.1.attn.c_attn:out"
    qkv = np.asarray(lm.run(tokens(), read=(name,)).values[name], np.float64)
    for n in range(4):
        for h in range(2):
            q, k, v = (
                qkv[n][:, part * 16 + h * 8 : part * 16 + (h + 1) * 8]
                for part in range(3)
            )
            for t in range(7):
                weight = np.exp(k[: t + 1] @ q[t] / np.sqrt(8))
                weight /= weight.sum()
                np.testing.assert_allclose(seen[n, 2 + h, t, : t + 1], weight, 1e-4)
                np.testing.assert_allclose(
                    held[n, t, 2 + h], weight @ v[: t + 1], atol=1e-5
                )
    assert (seen[..., 0, 1:] == 0).all()
    late = heads.outputs(lm, tokens(), skip=4)
    np.testing.assert_array_equal(late, held[:, 4:])
    np.testing.assert_allclose(heads.vectors(late), late.mean(1))
    np.testing.assert_array_equal(heads.vectors(late, "last"), held[:, -1])
    expected = [seen[:, h, [4, 5, 6], [2, 3, 4]].mean() for h in range(4)]
    np.testing.assert_allclose(heads.induction(lm, tokens(), 3), expected, rtol=1e-5)


def test_heads_that_are_not_kept_have_their_mean():
    lm = toy_lm()
    means = heads.outputs(lm, tokens()).mean((0, 1))
    kept = np.array([True, False, False, True])
    run = lm.run(tokens(), read=heads.sites(lm), write=heads.keep(lm, kept, means))
    first = np.asarray(run.values["head_out.0"]).reshape(4, 7, 2, 8)
    plain = heads.outputs(lm, tokens())
    np.testing.assert_allclose(first[:, :, 0], plain[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(first[:, :, 1], np.broadcast_to(means[1], (4, 7, 8)))
    all_kept, some = heads.losses_keeping(
        lm, tokens(), [np.ones(4, bool), kept], means, last=2
    )
    losses = np.asarray(lm.run(tokens(), losses=True).losses)
    np.testing.assert_allclose(all_kept, losses[:, -2:].mean(), rtol=1e-5)
    assert abs(some - all_kept) > 1e-5


@pytest.mark.usefixtures("as_users")
def test_patterns_of_other_families_are_refused():
    class Other:
        name, family = "other", None
        config = type("Config", (), {"model_type": "llama"})

    with pytest.raises(ValueError, match="'llama'; patterns of attention are known"):
        heads.patterns(Other(), tokens())


def test_prompts_differ_in_the_first_block_alone():
    def blocks(rng, n):
        return repeating.blocks(rng, n, 9)

    positive, negative = contrast(toy_lm(), blocks, np.random.default_rng(1), 6)
    np.testing.assert_array_equal(positive[:, 1:10], positive[:, 10:])
    np.testing.assert_array_equal(positive[:, 10:], negative[:, 10:])
    assert (positive[:, 1:10] != negative[:, 1:10]).mean() > 0.9
    assert all(len(set(row[1:10].tolist())) == 9 for row in negative)


def planted_auc(noise, seeds=range(4)):
    found = []
    for seed in seeds:
        planted = plant(seed, noise=noise)
        codes = codes_of(planted.positive, planted.negative, RULE, seed=seed)
        own = circuits.found(circuits.scores(*codes), planted.circuit)
        chance = circuits.shuffled(*codes, planted.circuit)
        found.append((own.node_auc, chance.node_auc))
    return np.mean(found, axis=0)


@pytest.mark.slow
def test_planted_heads_are_found_at_low_noise():
    own, chance = planted_auc(0.05)
    assert own >= 0.85
    assert own > chance + 0.15
    assert planted_auc(0.3)[0] < own - 0.15


@pytest.mark.slow
def test_heads_that_copy_form_and_are_seen_by_their_pattern():
    lm, losses = repeating.train(steps=200)
    assert losses[-1] < 0.1 < 3 < losses[0]
    block = repeating.blocks(np.random.default_rng(7), 16, 12)
    seen = heads.induction(lm, repeating.after(block, block), 12)
    assert seen.max() > 0.5
    other = repeating.blocks(np.random.default_rng(8), 16, 12)
    run = lm.run(repeating.after(other, block), losses=True)
    assert np.asarray(run.losses)[:, -11:].mean() > 3  # there is nothing to copy
