"""Whether two dictionaries agree, by hand, by brute force, and at the two ends."""

from functools import partial
from itertools import permutations

import numpy as np
import pytest

from sae_jax.evaluation import agreement

A = np.array([[1.0, 0], [2, 0], [0, 3]])
B = np.array([[0.8, 0.6], [0, -1], [-2, 0], [0.6, 0.8]])
# Cosines, signed:  a_0 and a_1: .8  0  -1  .6     a_2: .6  -1  0  .8


def gaussian(n_features, width, seed=0):
    return np.random.default_rng(seed).normal(size=(n_features, width))


def all_cosines(A, B):
    return np.array(
        [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in B] for a in A], np.float64
    )


def close(found, expected, atol=1e-14):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_best_matches_by_hand(x64):
    there = agreement.best_matches(A, B)
    assert there.rows.tolist() == [0, 1, 2]
    assert there.partners.tolist() == [0, 0, 3]
    close(there.cosines, [0.8, 0.8, 0.8])
    close(there.mean(), 0.8)
    assert there.shares_above() == {0.7: 1, 0.9: 0}
    back = agreement.best_matches(B, A)
    assert back.partners.tolist() == [0, 0, 2, 2]  # of equal ones, the first
    in_blocks = agreement.best_matches(B, A, block=1)
    assert in_blocks.partners.tolist() == [0, 0, 2, 2]
    close(back.cosines, [0.8, 0, 0, 0.8])
    close(back.mean(), 0.4)
    assert back.shares_above((0.5, 0.7, 0.9)) == {0.5: 0.5, 0.7: 0.5, 0.9: 0}


def test_above_a_threshold_is_not_at_it():
    # The cosines are 1 and 0, whatever is rounded.
    matches = agreement.best_matches(np.eye(2), np.array([[1.0, 0]]))
    assert matches.shares_above((-0.5, 0, 0.5, 1)) == {-0.5: 1, 0: 0.5, 0.5: 0.5, 1: 0}


def test_one_to_one_by_hand(x64):
    matches = agreement.one_to_one(A, B)
    # a_0 or a_1 has to leave b_0 to the other: .8 + .6 + 0 or .8 + 0 + .8
    close(matches.cosines.sum(), 1.6)
    assert len({*matches.partners}) == 3
    close(matches.mean(), 1.6 / 3)
    close(agreement.one_to_one(B, A).mean(), 1.6 / 3)


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_one_to_one_equals_the_best_of_all_assignments(shape, x64):
    A, B = gaussian(shape[0], 3), gaussian(shape[1], 3, seed=1)
    cos = all_cosines(A, B)
    if shape[0] <= shape[1]:
        chosen = permutations(range(shape[1]), shape[0])
        best = max(sum(cos[i, j] for i, j in enumerate(js)) for js in chosen)
    else:
        chosen = permutations(range(shape[0]), shape[1])
        best = max(sum(cos[i, j] for j, i in enumerate(rows)) for rows in chosen)
    matches = agreement.one_to_one(A, B)
    close(matches.cosines.sum(), best, 1e-13)
    close(cos[matches.rows, matches.partners], matches.cosines)
    assert len(matches.rows) == min(shape)


@pytest.mark.parametrize("block", [1, 3, 8, 17, 4096])
def test_best_matches_do_not_depend_on_the_blocks(block, x64):
    A, B = gaussian(17, 5), gaussian(8, 5, seed=1)
    for first, second in ((A, B), (B, A)):
        cos = all_cosines(first, second)
        found = agreement.best_matches(first, second, block=block)
        np.testing.assert_array_equal(found.partners, cos.argmax(1))
        close(found.cosines, cos.max(1))


def test_padding_is_nobodys_match(x64):
    # All cosines are negative, so a row of zeros would be the better match.
    A, B = np.array([[1.0, 0.1]]), np.array([[-1.0, 0.2], [-1, 0.3], [-1, 0.4]])
    found = agreement.best_matches(A, B, block=2)
    assert found.partners.tolist() == [2]
    close(found.cosines, all_cosines(A, B).max(1))
    assert found.mean() < -0.8


def test_a_permuted_copy_agrees_and_a_random_dictionary_does_not():
    A = gaussian(300, 64)
    order = np.random.default_rng(2).permutation(300)
    copy = (A * np.linspace(0.1, 9, 300)[:, None])[order]
    for match in (agreement.best_matches, agreement.one_to_one):
        matches = match(A, copy)
        np.testing.assert_array_equal(order[matches.partners], np.arange(300))
        close(matches.cosines, 1, 1e-6)  # float32
        assert matches.shares_above() == {0.7: 1, 0.9: 1}
        broken = match(A, gaussian(300, 64, seed=1))
        assert broken.mean() < 0.5
        assert broken.shares_above() == {0.7: 0, 0.9: 0}
        assert match(A, -copy).mean() < 0.5, "opposite directions are others"


def test_what_the_two_ways_differ_in():
    A = gaussian(40, 16)
    one_row = np.repeat(A[:1], 40, 0)
    close(agreement.best_matches(one_row, A).mean(), 1, 1e-6)
    assert agreement.one_to_one(one_row, A).mean() < 0.2
    assert agreement.best_matches(A, one_row).mean() < 0.2
    part = agreement.one_to_one(A[:10], A)
    close(part.cosines, 1, 1e-6)
    assert len(part.rows) == 10


def test_stability_is_the_mean_over_all_pairs_of_seeds(x64):
    seeds = [np.eye(3)[[0, 0, 1]], np.eye(3), np.eye(3)]
    # Seeds 1 and 2 are alike. Seed 0 lacks e_2: it finds all its rows in the others
    # (1, twice), and they find two of their three in it (2/3, twice).
    expected = (1 + 1 + 1 + 1 + 2 / 3 + 2 / 3) / 6
    found = agreement.stability(seeds)
    close(found.mean, expected)
    assert [*found.shares] == [0.7, 0.9]
    close([*found.shares.values()], expected)
    one_to_one = agreement.stability(
        seeds, match=agreement.one_to_one, thresholds=(0.5,)
    )
    # Of seed 0 one of the two equal rows stays without a partner worth having.
    close(one_to_one.mean, (2 * 1 + 4 * 2 / 3) / 6)
    close(one_to_one.shares[0.5], (2 * 1 + 4 * 2 / 3) / 6)
    blocked = partial(agreement.best_matches, block=2)
    close(agreement.stability(seeds, match=blocked).mean, expected)


def test_recovery_of_planted_features(x64):
    truth = np.eye(4)
    learned = np.array(
        [[1.0, 0, 0, 0], [5, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 0, -1], [0, 0, 1, 1]]
    )
    found = agreement.recovery(learned, truth, thresholds=(0.5, 0.75, 0.9))
    half = np.sqrt(0.5)
    # From the truth's side: 1, .8, .71, .71; -e_3 is not e_3.
    close(found.mmcs, (1 + 0.8 + half + half) / 4)
    assert found.found == {0.5: 1, 0.75: 0.5, 0.9: 0.25}
    # From the other: 1, 1, .8, 0, .71; the two copies of e_0 are both no strangers.
    close([found.spurious[t] for t in (0.5, 0.75, 0.9)], [0.2, 0.4, 0.6])
    perfect = agreement.recovery(3 * truth[::-1], truth)
    assert perfect == (1, {0.7: 1, 0.9: 1}, {0.7: 0, 0.9: 0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: agreement.best_matches(A, np.eye(3)), "widths 2 and 3; give two of"),
        (lambda: agreement.best_matches(A, 0 * B), "4 of 4 rows of the second .* zero"),
        (lambda: agreement.best_matches(A, B / 0), "second dictionary has NaN or inf"),
        (lambda: agreement.best_matches(A, B, block=0), "block=0; tiles have"),
        (lambda: agreement.stability([A]), "1 dictionaries; give two seeds or more"),
        (
            lambda: agreement.one_to_one(np.ones((8193, 1)), A),
            "of 8193 and 3 features .* refused above 8192. Take best_matches",
        ),
    ],
)
def test_faults(call, message):
    errors = np.errstate(divide="ignore", invalid="ignore")
    with errors, pytest.raises(ValueError, match=message):
        call()
