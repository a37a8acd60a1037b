"""Erasing a concept: features by set difference, the edit and its gate, by oracles."""

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import TrainedSAE
from sae_jax.analysis import erasure
from sae_jax.analysis.interpretation.scores import auroc
from sae_jax.evaluation.firings import Firings, record
from sae_jax.evaluation.heldout import HeldOut
from tests import analysis_oracles as oracles
from tests.test_spliced import LOSS, splice_one_by_one
from tests.toy_saes import NEAR, SITE, held_out, slow, trained, values_at
from tests.toys import toy_lm

FACTOR = -3.0


@pytest.fixture(scope="module")
def toy():
    """An SAE, prompts of which the first ones count at position 0 as well, codes."""
    sae, variables = trained("topk(k=6)")
    louder = {**variables.params, "W_enc": 30 * variables.params["W_enc"]}
    variables = variables._replace(params=louder)  # the toy's rows are short
    prompts = held_out(9)
    use = prompts.use.copy()
    use[:4, 0] = True
    prompts = prompts._replace(use=use)
    codes, _, _ = slow(sae, variables, prompts)
    shape = prompts.tokens.shape
    x = values_at(prompts, SITE).reshape(*shape, -1)
    return TrainedSAE(sae, variables), prompts, codes.reshape(*shape, -1), x


def peaks(one, prompts):
    return erasure.peaks(record(toy_lm(), one.sae, one.variables, SITE, prompts))


def part(prompts, which):
    return HeldOut(*(array[which] for array in prompts))


def weights(one):
    return np.asarray(one.variables.params["W_dec"], np.float64)


def planted():
    """Firings of 12 prompts, and the codes that they were made from."""
    rng = np.random.default_rng(2)
    codes = rng.random((12, 7, 40)) * (rng.random((12, 7, 40)) < 0.06)
    codes[:, 0] *= 3  # highest where it does not count
    use = np.arange(7) < rng.integers(3, 8, 12)[:, None]
    codes[~use] = 0
    found = [np.flatnonzero(codes[..., j]) for j in range(40)]
    values = [codes.reshape(-1, 40)[rows, j] for j, rows in enumerate(found)]
    starts = np.cumsum([0, *map(len, found)])
    none = np.zeros(use.size, np.float32)
    flat = np.concatenate(found).astype(np.int32), np.concatenate(values)
    tokens = np.zeros(use.shape, np.int32)
    firings = Firings(
        tokens, use, 40, starts, flat[0], flat[1].astype(np.float32), none, none
    )
    return firings, codes, use


@pytest.mark.parametrize("n", [1, 3, 40])
def test_features_are_a_difference_of_sets(n):
    firings, codes, use = planted()
    peak = erasure.peaks(firings)
    sets = oracles.strongest(codes, use, n)
    for chosen, expected in zip(erasure.strongest(peak, n), sets, strict=True):
        assert set(np.flatnonzero(chosen)) == expected
    expected = set.union(*sets[:5]) - set.union(*sets[5:9])
    found = erasure.contrast(peak[:5], peak[5:9], n)
    assert set(found.tolist()) == expected
    assert len(found) == len(expected) > 0
    in_how_many = [sum(int(j) in one for one in sets[:5]) for j in found]
    assert in_how_many == sorted(in_how_many, reverse=True)
    # If position 0 counted there would be others.
    first = np.concatenate([codes[:, :1], codes[:, :1], codes], 1)
    looked = oracles.strongest(first, np.pad(use, ((0, 0), (2, 0)), mode="edge"), n)
    assert n == 40 or looked != sets


def test_prompts_that_share_everything_have_no_difference(toy):
    peak = peaks(*toy[:2])
    with pytest.raises(ValueError, match="take fewer retained prompts"):
        erasure.contrast(peak[:2], peak[:4], 5)


def test_the_edit_and_the_responses_are_the_oracles(toy):
    one, prompts, codes, x = toy
    ids = np.argsort(-(codes > 0).sum((0, 1)))[:5]
    expected, moved = oracles.erased(x, codes, weights(one), ids, FACTOR, prompts.use)
    edit = erasure.erase(one, ids, prompts.use, factor=FACTOR)
    rows = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(edit(rows), expected, atol=50 * NEAR)
    np.testing.assert_array_equal(np.asarray(edit(rows))[:, 0], rows[:, 0])
    found = erasure.effect(
        toy_lm(), one, SITE, ids, prompts, factor=FACTOR, contexts_per_pass=4
    )
    np.testing.assert_allclose(found.responses, moved, rtol=1e-4)
    assert (moved > 0).any()


def test_the_gate_leaves_every_bit_of_prompts_below_it(toy):
    one, prompts, codes, x = toy
    ids = np.argsort(-(codes > 0).sum((0, 1)))[2:7]
    expected, moved = oracles.erased(x, codes, weights(one), ids, FACTOR, prompts.use)
    order = np.argsort(moved)
    target, unrelated = order[4:], order[:4]
    threshold = erasure.threshold_of(moved[target])
    assert threshold == 0.99 * moved[order[4]]
    rows = jnp.asarray(x, jnp.float32)
    edit = erasure.erase(one, ids, prompts.use, factor=FACTOR, threshold=threshold)
    new = np.asarray(edit(rows))
    np.testing.assert_array_equal(new[unrelated], rows[unrelated])
    assert moved[unrelated].max() > 0  # ungated, they would have changed
    assert (new[target] != rows[target]).any((1, 2)).all()
    np.testing.assert_allclose(new[target], expected[target], atol=50 * NEAR)


def test_a_threshold_of_another_statistic_would_shut_target_prompts_out(toy):
    """What the authors' code does: the largest token sets it, the mean is compared."""
    one, prompts, codes, x = toy
    ids = np.argsort(-(codes > 0).sum((0, 1)))[2:7]
    new, moved = oracles.erased(x, codes, weights(one), ids, FACTOR, prompts.use)
    largest = np.square(new - x).mean(-1).max(1)
    ours = erasure.threshold_of(moved[moved > 0])
    theirs = erasure.threshold_of(largest[moved > 0])
    assert (moved[moved > 0] >= ours).all()
    assert not (moved[moved > 0] >= theirs).all()


def test_losses_are_those_of_prompts_one_by_one(toy):
    one, prompts, codes, x = toy
    ids = np.argsort(-(codes > 0).sum((0, 1)))[:5]
    new, moved = oracles.erased(x, codes, weights(one), ids, FACTOR, prompts.use)
    threshold = float(np.sort(moved)[-3:].min()) * 0.99
    gated = np.where((moved >= threshold)[:, None, None], new, x)
    found = erasure.effect(
        toy_lm(),
        one,
        SITE,
        ids,
        prompts,
        factor=FACTOR,
        threshold=threshold,
        contexts_per_pass=4,
    ).scores
    losses = []
    for name, value in (("clean", x), ("erased", new), ("guarded", gated)):
        loss, divergence = splice_one_by_one(prompts, SITE, value)
        losses.append(loss)
        assert abs(found[f"loss_{name}"] - loss) < 5 * LOSS, name
        if name != "clean":
            assert abs(found[f"kl_{name}"] - divergence) < 5 * LOSS, name
    assert len({round(loss, 4) for loss in losses}) == 3
    assert found["edited"] == 3 / 9


def test_prompts_that_do_not_respond_set_no_gate():
    assert erasure.threshold_of(np.array([4.0, 2.0]), margin=0.5) == 1.0
    with pytest.raises(ValueError, match="2 of the 3 target prompts do not respond"):
        erasure.threshold_of(np.array([0.0, 1.0, 0.0]))


def test_shuffled_labels_tell_nothing():
    rng = np.random.default_rng(0)
    right, wrong = rng.normal(2, 1, 30), rng.normal(0, 1, 50)
    chance = erasure.auroc_by_chance(right, wrong)
    assert auroc(right, wrong) > 0.85 > np.quantile(chance, 0.99)
    assert abs(chance.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(chance, erasure.auroc_by_chance(right, wrong))
