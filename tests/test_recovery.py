"""Scores against a planted truth: known values, and slow versions in loops."""

from itertools import permutations

import numpy as np
import pytest

from experiments import _recovery, _recovery_table
from tests.conftest import planted

N, D, ROWS = 6, 16, 500


def truth(seed=0, n=N):
    _, directions, codes = planted(D, n, 0.3, ROWS, seed)
    return directions, codes


def oracle(directions, codes, W_dec, learned):
    """The scores of N true and N or more learned features, by trying all pairings."""
    n, f = len(directions), len(W_dec)
    for j in range(f):
        if sum(learned[:, j]) < 0:
            W_dec, learned = W_dec.copy(), learned.copy()
            W_dec[j], learned[:, j] = -W_dec[j], -learned[:, j]
    cos = np.zeros((n, f))
    for i in range(n):
        for j in range(f):
            a, b = directions[i], W_dec[j]
            cos[i, j] = a @ b / np.sqrt((a @ a) * (b @ b))
    partner = max(
        permutations(range(f), n),
        key=lambda js: sum(cos[i, j] for i, j in enumerate(js)),
    )
    precision, recall, f1 = [], [], []
    for i, j in enumerate(partner):
        both = said = truly = 0
        for row in range(len(codes)):
            on, fires = codes[row, i] != 0, learned[row, j] != 0
            both, said, truly = both + (on and fires), said + fires, truly + on
        p, r = (both / said if said else 0), both / truly
        precision.append(p)
        recall.append(r)
        f1.append(2 * p * r / (p + r) if p + r else 0)
    a, b = (codes != 0).sum(1), (learned != 0).sum(1)
    a, b = a - a.mean(), b - b.mean()
    best = cos.max(1)
    return {
        "matched_cosine": np.mean([cos[i, j] for i, j in enumerate(partner)]),
        "mmcs": best.mean(),
        "frr80": (best > 0.8).mean(),
        "frr90": (best > 0.9).mean(),
        "precision": np.mean(precision),
        "recall": np.mean(recall),
        "f1": np.mean(f1),
        "l0_correlation": (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()),
    }


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_scores_equal_those_of_loops(seed, signed, x64):
    directions, codes = truth(seed)
    rng = np.random.default_rng(seed)
    W_dec = np.concatenate([directions, rng.normal(size=(2, D))])
    W_dec = (W_dec + 0.15 * rng.normal(size=W_dec.shape))[rng.permutation(8)]
    learned = np.maximum(codes @ directions @ W_dec.T - 0.6, 0)
    if signed:
        turn = rng.choice([-1, 1], 8)
        W_dec, learned = W_dec * turn[:, None], learned * turn
    found = _recovery.recovered(directions, codes, W_dec, learned)
    expected = oracle(directions, codes, W_dec, learned)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)
    assert 0.1 < expected["f1"] < 0.999


def test_the_truth_itself_scores_one():
    directions, codes = truth()
    order = np.random.default_rng(1).permutation(N)
    scale = np.linspace(0.5, 3, N)
    W_dec, learned = (directions * scale[:, None])[order], (codes / scale)[:, order]
    for sign in (1, -1):
        found = _recovery.recovered(directions, codes, sign * W_dec, sign * learned)
        np.testing.assert_allclose([*found.values()], 1, atol=1e-6)
    x = codes @ directions
    assert _recovery.nmse(x, learned @ W_dec) < 1e-12


def test_a_random_dictionary_does_not():
    directions, codes = truth(n=30)
    other, _ = truth(seed=5, n=30)
    learned = np.maximum(codes @ directions @ other.T - 0.6, 0)
    found = _recovery.recovered(directions, codes, other, learned)
    assert found["matched_cosine"] < 0.6
    assert found["frr80"] < 0.1
    assert found["f1"] < 0.6
    opposite = _recovery.recovered(directions, codes, -directions, codes)
    assert opposite["matched_cosine"] < 0.6, "opposite directions are others"


def test_what_has_no_partner_counts_as_nothing():
    directions, codes = truth()
    half = _recovery.recovered(directions, codes, directions[:3], codes[:, :3])
    for name in ("matched_cosine", "precision", "recall", "f1", "frr90"):
        np.testing.assert_allclose(half[name], 0.5, atol=1e-6)
    assert 0.5 < half["mmcs"] < 1
    # Rows of zeros have no direction, whatever fires there.
    W_dec = np.concatenate([directions[:3], np.zeros((3, D))])
    assert half["f1"] == _recovery.recovered(directions, codes, W_dec, codes)["f1"]
    nothing = _recovery.recovered(directions, codes, 0 * directions, 0 * codes)
    assert nothing.pop("l0_correlation") is None
    assert {*nothing.values()} == {0.0}
    assert nothing.keys() == half.keys() - {"l0_correlation"}


def test_firing_by_hand():
    on = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]], bool)
    fires = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0]], bool)
    # The first: right once, fires thrice, on twice. The second never fires; the third
    # is never on and does not count.
    found = _recovery.firing(on, fires)
    np.testing.assert_allclose(found, [1 / 3 / 2, 1 / 2 / 2, 2 / 5 / 2])


def test_nmse_and_correlation_by_hand():
    x = np.array([[0.0, 0], [2, 0], [4, 3]])  # mean (2, 1): spread 5 + 1 + 8
    off = np.array([[1, 0], [0, 0], [0, 2]])
    np.testing.assert_allclose(_recovery.nmse(x, x + off), 5 / 14)
    np.testing.assert_allclose(_recovery.nmse(x, np.tile(x.mean(0), (3, 1))), 1)
    a = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1]])
    np.testing.assert_allclose(_recovery.l0_correlation(-a, 2 * a), 1)
    np.testing.assert_allclose(_recovery.l0_correlation(1 - a, a), -1)
    assert _recovery.l0_correlation(np.ones((3, 2)), a) is None


def rows(*, rules=("topk", "relu"), worlds=("equal", "zipf"), seeds=(0, 1)):
    """Rows whose means are known; relu has its L0 on `equal` only."""
    return [
        {
            **dict(world=world, rule=rule, given=rule, seed=seed, true_l0=3.0),
            **dict(l0=3.0 + i + seed, matched=i == 0 or world == "equal"),
            **dict(matched_cosine=0.9 - 0.1 * seed, mmcs=0.9, frr80=0.5, frr90=0.25),
            **dict(precision=0.5, recall=1.0, f1=0.66, nmse=0.123, dead=0.25),
            **dict(l0_correlation=None if i == 0 else 0.5, diverged_in_step=None),
        }
        for i, rule in enumerate(rules)
        for world in worlds
        for seed in seeds
    ]


def test_the_table_has_means_and_deviations():
    text = _recovery_table.table(rows())
    first, second = text.split("World ")[1:]
    assert first.startswith("equal, true L0 3.00, seeds: 2")
    lines = {line.split()[0]: line.split() for line in second.splitlines() if line}
    assert (
        lines["topk"][1:]
        == (
            "3.50±0.71 .85±.07 .90±.00 .50±.00 .25±.00 .50±.00 1.00±.00 .66±.00 - "
            ".12±.00 25.0±0.0"
        ).split()
    )
    assert "relu* " in second
    assert "relu* " not in first
    assert "topk* " not in text
    _, _, *table = second.splitlines()[:-2]
    assert len({len(line) for line in table[2:4]}) == 1, "columns are aligned"
    alone = _recovery_table.table(rows(seeds=(1,)))
    assert "seeds: 1" in alone
    assert "±" not in alone


def test_the_markdown_table_is_rules_by_worlds():
    text = _recovery_table.markdown(
        [*rows(), *rows(rules=("gated",), worlds=("zipf",))]
    )
    assert text.splitlines() == [
        "| rule | equal (3.00) | zipf (3.00) |",
        "|---|---|---|",
        "| `topk` | .85 / .66 / 3.50 | .85 / .66 / 3.50 |",
        "| `relu` | .85 / .66 / 4.50 | .85 / .66 / 4.50\\* |",
        "| `gated` |  | .85 / .66 / 3.50 |",
    ]


def test_one_rule_with_other_arguments_is_called_by_its_spec():
    made = rows(rules=("topk(k=3)", "topk(k=4)", "relu"))
    assert list(_recovery_table.labels(made).values()) == [
        "topk(k=3)",
        "topk(k=4)",
        "relu",
    ]
