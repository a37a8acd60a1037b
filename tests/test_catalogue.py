"""The catalogue against loops over features and rows, and against features by heart."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.evaluation.catalogue import GROUPS, activity, catalogue
from sae_jax.evaluation.firings import Firings
from tests import oracles
from tests.toy_saes import AIM, NEAR, SITE, F, held_out, slow, trained
from tests.toys import toy_lm


def slow_numbers(codes, norm_z, norm_f, W_dec, used):
    """Density, strength, highest, norm ratio and histogram of each feature."""
    table = []
    for j in range(codes.shape[1]):
        active = [r for r in used if codes[r, j] != 0]
        if not active:
            table.append((0, 0, 0, math.nan, [0] * 20))
            continue
        values = [float(codes[r, j]) for r in active]
        length = math.sqrt(sum(w * w for w in W_dec[j]))
        bins = [0] * 20
        for value in values:
            at = [b for b in range(20) if value <= max(values) * (b + 1) / 20]
            bins[at[0] if at else 19] += 1
        table.append(
            (
                len(active) / len(used),
                sum(values) / len(values) * length,
                max(values),
                sum(norm_f[r] / norm_z[r] for r in active) / len(active),
                bins,
            )
        )
    return [np.array(column) for column in zip(*table, strict=True)]


@pytest.mark.parametrize("spec", ["relu", "topk(k=2)"])
def test_every_field_is_the_oracles(spec):
    heldout, (sae, variables) = held_out(), trained(spec, treatment="standardise")
    params = {n: np.array(p) for n, p in variables.params.items()}
    params["W_dec"][3] = 0  # no direction, and nobody's neighbour
    params["b_enc"] = np.where(np.arange(F) == 5, -1e3, params["b_enc"])  # dead
    variables = variables._replace(
        params={n: jnp.asarray(p) for n, p in params.items()}
    )
    found = catalogue(toy_lm(), sae, variables, SITE, heldout, contexts_per_pass=4)
    codes, norm_z, norm_f = slow(sae, variables, heldout)
    used = np.flatnonzero(heldout.use).tolist()
    expected = slow_numbers(codes, norm_z, norm_f, params["W_dec"], used)
    for name, theirs in zip(found._fields[1:5], expected, strict=False):
        ours = getattr(found, name)
        np.testing.assert_allclose(ours, theirs, rtol=NEAR, atol=NEAR, err_msg=name)
    np.testing.assert_array_equal(found.histogram, expected[4])
    assert found.density[5] == found.strength[5] == found.highest[5] == 0
    assert math.isnan(found.norm_ratio[5])
    assert (found.examples[5] == -1).all()
    assert (found.raised[5] == -1).all()
    assert np.isnan(found.lowered_by[5]).all()
    assert found.groups == GROUPS

    lengths = oracles.row_norms(params["W_dec"])
    lengths[3] = 1
    cosine = (params["W_dec"] / lengths[:, None]).astype(np.float64)
    cosine = cosine @ cosine.T
    for j in range(F):
        if j == 3:
            assert (found.nearest[3] == -1).all()
            continue
        others = sorted({*range(F)} - {3, j}, key=lambda i: -abs(cosine[j, i]))
        assert found.nearest[j].tolist() == others[:5]
        np.testing.assert_allclose(
            found.nearest_cosine[j], cosine[j, others[:5]], atol=NEAR
        )


def firings_of(features, context, n_contexts):
    """Firings known by heart: for each feature {row: value}."""
    rows = [sorted(feature) for feature in features]
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    n_rows = context * n_contexts
    return Firings(
        np.zeros((n_contexts, context), np.int32),
        np.ones((n_contexts, context), bool),
        len(features),
        starts.astype(np.int64),
        np.concatenate(rows).astype(np.int32),
        np.array(
            [f[r] for f, own in zip(features, rows, strict=True) for r in own], "f4"
        ),
        np.full(n_rows, 2, np.float32),
        np.arange(n_rows, dtype=np.float32),
    )


def groups_of(examples):
    """The columns of each group, by label, without those that are empty."""
    found, start = {}, 0
    for label, n in GROUPS:
        found[label] = [int(r) for r in examples[start : start + n] if r >= 0]
        start += n
    assert start == len(examples)
    return found


def test_features_worked_by_hand():
    ladder = {row: row + 1.0 for row in range(20)}  # 1 to 20
    signed = {3: -4.0, 8: 2.0}
    found = activity(firings_of([ladder, {}, {7: 0.5}, signed], 5, 8))
    np.testing.assert_array_equal(found.density, [0.5, 0, 1 / 40, 2 / 40])
    np.testing.assert_array_equal(found.mean, [10.5, 0, 0.5, 3])
    np.testing.assert_array_equal(found.highest, [20, 0, 0.5, 4])
    # norm_f is the row's number, norm_z is 2
    np.testing.assert_array_equal(found.norm_ratio, [4.75, np.nan, 3.5, 2.75])
    np.testing.assert_array_equal(found.histogram[0], [1] * 20)  # bins hold their top
    assert found.histogram[1].sum() == 0
    assert found.histogram[2].tolist() == [0] * 19 + [1]
    assert np.flatnonzero(found.histogram[3]).tolist() == [9, 19]
    assert groups_of(found.examples[2])["strongest"] == [7]
    assert groups_of(found.examples[3])["strongest"] == [3, 8]
    assert (found.examples[2, 1:] == -1).all()


def test_the_strongest_are_of_different_contexts_while_there_are_such():
    """Contexts of 10. Values fall with the row, so context 0 has the ten largest."""
    many = {row: 100.0 - row for row in range(100)}  # 10 contexts
    few = {row: 100.0 - row for row in range(30)}  # 3 contexts
    late = {row: 1.0 + row for row in range(30)}  # the strongest come last
    found = activity(firings_of([many, few, late], 10, 10)).examples
    assert groups_of(found[0])["strongest"] == [0, 10, 20, 30, 40, 50, 60, 70]
    assert groups_of(found[1])["strongest"] == [0, 1, 2, 3, 4, 5, 10, 20]
    assert groups_of(found[2])["strongest"] == [29, 28, 27, 26, 25, 24, 19, 9]


def test_ties_go_to_the_earlier_row():
    found = activity(firings_of([dict.fromkeys(range(0, 100, 5), 1.0)], 10, 10))
    assert groups_of(found.examples[0])["strongest"] == [*range(0, 80, 10)]


def test_quarters_are_by_rank_and_show_nothing_twice():
    """Values of very uneven size: their ranks count."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(400)[:100]
    falling = {int(row): 2.0**-rank for rank, row in enumerate(rows)}
    firings = firings_of([falling] * 30, 10, 40)
    found = activity(firings).examples
    rank = {int(row): rank for rank, row in enumerate(rows)}
    seen = set()
    for examples in found:
        groups = groups_of(examples)
        shown = [row for group in groups.values() for row in group]
        assert len({*shown}) == len(shown) == 16
        labels = ["top quarter", "second quarter", "third quarter", "bottom quarter"]
        for quarter, label in enumerate(labels):
            ranks = [rank[row] for row in groups[label]]
            assert len(ranks) == 2
            assert ranks == sorted(ranks)
            assert all(25 * quarter <= r < 25 * (quarter + 1) for r in ranks)
            seen.update(ranks)
    # 30 features of the same values: 240 draws reach most of the 92 that can be drawn.
    assert len(seen) > 70
    np.testing.assert_array_equal(activity(firings).examples, found)
    assert (activity(firings, seed=1).examples != found).any()


def test_a_feature_has_the_same_examples_whatever_the_others_do():
    falling = {row: 90.0 - row for row in range(50)}
    alone = activity(firings_of([{}, falling], 10, 5)).examples[1]
    beside = activity(firings_of([{2: 1.0}, falling, falling], 10, 5)).examples[1]
    np.testing.assert_array_equal(alone, beside)


def test_rows_without_a_norm_are_silent():
    firings = firings_of([{0: 1.0}, {1: 2.0}], 2, 1)
    zero = firings._replace(norm_z=np.zeros(2, np.float32))
    assert np.isnan(activity(zero).norm_ratio[0])  # 0 / 0
    assert activity(zero).norm_ratio[1] == np.inf


def test_a_transcoder_of_heads_has_no_tokens():
    """What it writes are heads, which the output projection still mixes."""
    heldout = held_out(3)
    sae, variables = trained("topk(k=2)", d_out=16)
    found = catalogue(toy_lm(), sae, variables, SITE, heldout, target_site="head_out.1")
    assert found.raised is found.raised_by is found.lowered is found.lowered_by is None
    assert found.density.sum() > 0
    found = catalogue(toy_lm(), sae, variables, SITE, heldout, target_site=AIM)
    assert found.raised.shape == found.lowered_by.shape == (F, 8)
