import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import SAE, largest, select, words
from sae_jax.piecewise import by_rows
from tests import oracles

CASES = {
    "gaussian": lambda r, n, f: np.maximum(r.normal(size=(n, f)), 0),
    "positive": lambda r, n, f: r.uniform(0.1, 1, (n, f)),
    "tied": lambda r, n, f: r.integers(0, 4, (n, f)).astype(float),
    "all equal": lambda r, n, f: np.full((n, f), 0.3),
    "all zero": lambda r, n, f: np.zeros((n, f)),
    "huge": lambda r, n, f: np.maximum(r.normal(size=(n, f)), 0) * 1e15,
    "one huge": lambda r, n, f: r.uniform(0, 1, (n, f)) + 1e10 * (np.arange(f) == 7),
    "past the 1e4 of the reference": lambda r, n, f: r.uniform(0, 5e3, (n, f)),
}


def targets(strengths, rng):
    norms = np.linalg.norm(strengths, axis=1)
    return {
        "a share": norms * rng.uniform(0, 1, len(norms)),
        "out of reach": norms * 1.5 + 1,
        "zero": 0 * norms,
    }


@pytest.mark.parametrize("how", ["nearest", "exceed"])
@pytest.mark.parametrize("case", CASES)
def test_norm_cut_equals_the_sort_in_float64(case, how, x64):
    rng = np.random.default_rng(0)
    for n_features in (1, 2, 9, 300, 512):
        strengths = CASES[case](rng, 96, n_features)
        for name, target in targets(strengths, rng).items():
            found = select.norm_cut(
                jnp.asarray(strengths), jnp.asarray(target), how=how
            )
            expected = oracles.norm_cut(strengths, target, how)
            # Features of strength 0 give codes of 0 whether selected or not.
            differ = (np.asarray(found) != expected) & (strengths > 0)
            assert not differ.any(), f"{name}, F={n_features}: {differ.any(1).sum()}"


def differing_rows(strengths, target, dtype):
    """Share of rows whose selection is not the float64 sort's, and the worst loss."""
    rounded = np.asarray(jnp.asarray(strengths, dtype), np.float64)
    target = np.asarray(jnp.asarray(target, dtype), np.float64)
    found = select.norm_cut(jnp.asarray(rounded, dtype), jnp.asarray(target, dtype))
    expected = oracles.norm_cut(rounded, target, "nearest")
    differ = ((np.asarray(found) != expected) & (rounded > 0)).any(1)

    def miss(mask):
        return np.abs(np.sqrt((rounded**2 * mask).sum(1)) - target)

    excess = (miss(np.asarray(found)) - miss(expected)) / np.maximum(target, 1e-30)
    return differ.mean(), excess[differ].max(initial=0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_cut_in_low_precision_differs_only_where_candidates_tie(dtype, capsys):
    rng = np.random.default_rng(1)
    strengths = np.maximum(rng.normal(size=(512, 4096)), 0)
    target = np.linalg.norm(strengths, axis=1) * rng.uniform(0.2, 1, 512)
    share, excess = differing_rows(strengths, target, dtype)
    with capsys.disabled():
        print(
            f"\nnorm_cut in {dtype}: {share:.2%} of rows differ from the float64 sort"
        )
    assert excess < 4 * np.finfo(np.float32).eps  # sums stay in float32 for both
    assert share < 0.003


@pytest.mark.parametrize("how", ["nearest", "exceed"])
def test_norm_cut_bears_scores_whose_squares_leave_float32(how):
    """Huge rows, tiny ones and ordinary ones, lengths included; 33 rows leave a rest.

    What the lengths lift or lower across the range counts as it comes out.
    """
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(33, 40)) * 10.0 ** rng.choice(
        [-34, -20, 0, 19, 35], (33, 1)
    )
    lengths = 2.0 ** rng.integers(-9, 9, 40)
    scores = scores.astype(np.float32)
    strengths = np.maximum(scores, 0).astype(np.float64) * lengths
    target = np.linalg.norm(strengths, axis=1) * rng.uniform(0.2, 0.9, 33)
    arrays = jnp.asarray(scores), jnp.asarray(target, jnp.float32)
    cut = jax.jit(partial(select.norm_cut, how=how))
    found = cut(*arrays, lengths=jnp.asarray(lengths, jnp.float32))
    expected = oracles.norm_cut(strengths, target, how)
    np.testing.assert_array_equal(np.asarray(found) & (scores > 0), expected)


@pytest.mark.parametrize("how", ["nearest", "exceed"])
def test_norm_cut_of_an_exact_code_leaves_out_what_is_lost_in_rounding(how):
    rng = np.random.default_rng(9)
    strengths = np.concatenate(
        [rng.uniform(1, 2, (288, 5)), np.full((288, 35), 1e-5)], 1
    )
    strengths = strengths.astype(np.float32)
    target = np.linalg.norm(strengths[:, :5].astype(np.float64), axis=1)
    cut = jax.jit(partial(select.norm_cut, how=how))
    found = cut(jnp.asarray(strengths), jnp.asarray(target, jnp.float32))
    np.testing.assert_array_equal(found.sum(1), 5)


def test_norm_cut_has_no_finite_sentinel():
    """The reference's finite sentinel keeps everything for norms near 1e4."""
    strengths = jnp.full((1, 64), 1250.0)  # c_64 = 1e4
    kept = select.norm_cut(strengths, jnp.asarray([9990.0])).sum()
    assert kept == 63


@pytest.mark.parametrize("count", [1, 3, 8, 50])
def test_rows_takes_the_largest_with_ties_to_the_lower_index(count):
    scores = np.random.default_rng(2).integers(0, 6, (40, 50)).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, order, True, axis=1)
    for traced in (False, True):
        amount = jnp.float32(count) if traced else count
        ceiling = 50 if traced else count
        found = select.rows(jnp.asarray(scores), amount, count_max=ceiling)
        if isinstance(found, select.Rows):
            assert count == 1, "few enough to be sparse"
            mask = np.zeros(scores.shape, bool)
            np.put_along_axis(mask, np.asarray(found.indices), found.keep, axis=1)
            found = mask
        np.testing.assert_array_equal(found, expected)


def test_sparse_rows_keep_a_traced_count_below_their_ceiling(monkeypatch):
    monkeypatch.setattr(select, "SPARSE_BELOW", 1.0)
    scores = jnp.asarray(np.random.default_rng(8).normal(size=(4, 9)))
    find = jax.jit(lambda count: select.rows(scores, count, count_max=5))
    for count in (0, 1, 3, 5):
        found = find(jnp.float32(count))
        np.testing.assert_array_equal(found.keep.sum(1), count)
        order = np.argsort(-np.asarray(scores), axis=1)[:, :count]
        kept = np.asarray(found.indices)[np.asarray(found.keep)].reshape(4, count)
        np.testing.assert_array_equal(kept, np.sort(order, axis=1))


def test_pieces_of_rows_cover_every_row_once():
    a, b = jnp.arange(22.0).reshape(11, 2), jnp.arange(11.0)
    for at_once in (1, 4, 10, 11, 12):
        found = by_rows(lambda a, b: (a.sum(1), a * b[:, None]), at_once, a, b)
        np.testing.assert_array_equal(found[0], a.sum(1))
        np.testing.assert_array_equal(found[1], a * b[:, None])


BATCHES = {
    "ties": lambda r, shape: r.integers(0, 9, shape),
    "gaussian": lambda r, shape: r.normal(size=shape),
    "negative": lambda r, shape: -r.uniform(1, 2, shape),
    "all equal": lambda r, shape: np.full(shape, -0.5),
    "in one row": lambda r, shape: r.normal(size=shape) + 99 * np.eye(shape[0], 1),
    "excluded": lambda r, shape: np.where(r.uniform(size=shape) < 0.5, -np.inf, 1),
    "bfloat16": lambda r, shape: jnp.asarray(r.normal(size=shape), jnp.bfloat16),
}


@pytest.mark.parametrize("shape", [(20, 30), (7, 256), (99, 1)])
@pytest.mark.parametrize("name", BATCHES)
def test_batch_takes_the_largest_of_all_with_ties_to_the_lower_index(
    name, shape, monkeypatch
):
    scores = BATCHES[name](np.random.default_rng(3), shape)
    scores = jnp.asarray(scores, None if name == "bfloat16" else jnp.float32)
    flat = np.asarray(scores, np.float64).ravel()
    for count in (1, 77, flat.size):
        order = np.argsort(-flat, kind="stable")[:count]
        expected = np.isin(np.arange(flat.size), order).reshape(shape)
        for below in (0, 2.0):
            monkeypatch.setattr(select, "SPARSE_BELOW", below)
            for traced in (False, True):
                amount = jnp.float32(count) if traced else count
                ceiling = min(2 * count, flat.size) if traced else count
                found = select.batch(scores, amount, count_max=ceiling)
                if below:
                    for of, n in zip((found.rows, found.features), shape, strict=True):
                        assert 0 <= of.min() <= of.max() < n  # those not kept too
                    kept = np.asarray(found.keep)
                    places = (
                        np.asarray(found.rows)[kept],
                        np.asarray(found.features)[kept],
                    )
                    assert (np.diff(np.ravel_multi_index(places, shape)) > 0).all()
                    mask = np.zeros(shape, bool)
                    mask[places] = True
                    found = mask
                np.testing.assert_array_equal(found, expected)


def test_the_largest_of_all_take_little_more_than_the_blocks_they_are_in():
    """Neither their counts nor their masks exist as arrays of numbers."""
    scores, n = jax.random.normal(jax.random.key(0), (64, 4096)), 4096
    find = jax.jit(partial(largest.of_all, count=n, count_max=n))
    compiled = find.lower(scores).compile()
    places = np.sort(np.argsort(-np.ravel(scores))[:n])
    np.testing.assert_array_equal(
        compiled(scores), np.unravel_index(places, scores.shape)
    )
    blocks = n * largest.BLOCK * scores.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * blocks


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_the_first_places_of_a_mask(size):
    rng = np.random.default_rng(size)
    for share in (0, 0.1, 0.5, 1):
        mask = rng.random(size) < share
        for n in {1, size // 2 + 1, size}:
            places = largest.compacted(jnp.asarray(mask), n)
            true = np.flatnonzero(mask)[:n]
            assert places.shape == (n,)
            np.testing.assert_array_equal(places[: len(true)], true)
            np.testing.assert_array_equal(places[len(true) :], size - 1)
            assert words.count(jnp.asarray(mask)[None]) == mask.sum()


@pytest.mark.parametrize("shape", [(9, 4096), (9, 4100)])
@pytest.mark.parametrize("name", BATCHES)
def test_the_largest_of_each_row_by_way_of_blocks(name, shape):
    """Those that a stable sort has first, in the order of their places."""
    scores = BATCHES[name](np.random.default_rng(6), shape)
    scores = jnp.asarray(scores, None if name == "bfloat16" else jnp.float32)
    wide = np.asarray(scores, np.float32)
    ranks = np.argsort(-wide, axis=1, kind="stable")
    for k in (1, 32, 300):
        values, indices = largest.per_row(scores, k)
        np.testing.assert_array_equal(indices, np.sort(ranks[:, :k], axis=1))
        np.testing.assert_array_equal(values, np.take_along_axis(wide, indices, 1))


def test_rows_selected_piece_by_piece_are_those_of_all_preactivations(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (50, 16), (512, 16), (512,), (16,)
    drawn = [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]
    encoder = sae_jax.products.encoder_product(*drawn, jnp.float32)
    whole = select.rows(encoder.pre, 4, count_max=4)
    for at_once in (7, 25, 50, 256):  # 7 leaves a rest
        monkeypatch.setattr(select, "ROWS_ENCODED", at_once)
        found = select.rows(encoder, 4, count_max=4)
        np.testing.assert_array_equal(found.indices, whole.indices)
        picked = np.take_along_axis(np.asarray(encoder.pre), found.indices, axis=1)
        np.testing.assert_allclose(found.picked, picked, rtol=1e-5)  # other sums


def test_selecting_from_the_encoder_never_holds_all_preactivations():
    """In the compiled program of a whole step, AuxK of many dead features included."""
    sae = SAE(16, 2048, rule="topk(k=4)")
    optimiser = sae_jax.adam(1e-3)
    state = sae_jax.init_state(sae, optimiser, jax.random.key(0))
    for aux in (None, sae_jax.AuxK()):
        step = sae_jax.make_step(sae, optimiser, aux=aux)
        text = step.lower(state, {"x": jnp.ones((512, 16))}).compile().as_text()
        assert "[512,2048]" not in text
        assert "f32[256,2048]" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rule",
    [
        *("topk(k=32)", "topk(k=200)", "batch_topk(k=8.5)", "matryoshka", "top_afa"),
        *("mutual_choice(k=8.5)", "feature_choice(k=8.5)"),
    ],
)
def test_no_training_step_sorts(rule, dtype):
    """In the compiled program, gradients, AuxK and schedules included.

    Only lists of what was selected are sorted, of which a row has up to 80 entries, and
    lists of features.
    """
    sae = SAE(32, 2048, rule=rule, dtype=dtype)
    knob = sae_jax.Knob()
    if sae.bound.rule.budget:
        knob = sae_jax.Knob(start=2.0, steps=10, target_l0=40.0)
    optimiser = sae_jax.adam(1e-3)
    state = sae_jax.init_state(sae, optimiser, jax.random.key(0))
    step = sae_jax.make_step(sae, optimiser, knob=knob)
    text = step.lower(state, {"x": jnp.ones((64, 32))}).compile().as_text()
    assert "popcnt(" in text, "AuxK at least selects, by counting bits"
    assert '"TopK"' not in text
    assert max(sorted_sizes(text), default=0) <= 64 * 80


def sorted_sizes(text):
    """How many numbers each sort of a compiled program takes."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:[^=]*\) )?sort\(", text)
    assert len(shapes) == len(re.findall(r" sort\(", text))
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


def test_the_pattern_finds_the_sorts_that_top_k_can_turn_into():
    def kth(scores):  # a static slice that does not start at 0
        return jax.lax.top_k(scores, 8)[0][:, 7]

    scores = jnp.ones((8, 4096), jnp.bfloat16)
    text = jax.jit(kth).lower(scores).compile().as_text()
    assert max(sorted_sizes(text)) >= 8 * 4096


@pytest.mark.parametrize("name", BATCHES)
def test_columns_takes_the_largest_of_each_with_ties_to_the_lower_index(
    name, monkeypatch
):
    """300 columns are more than are looked at together, and leave a rest."""
    shape, rng = (11, 300), np.random.default_rng(4)
    scores = BATCHES[name](rng, shape)
    scores = jnp.asarray(scores, None if name == "bfloat16" else jnp.float32)
    order = np.argsort(-np.asarray(scores, np.float64), axis=0, kind="stable")
    each = rng.integers(0, shape[0] + 1, shape[1])
    for counts in (each, shape[0] + 3):
        expected = np.zeros(shape, bool)
        for column, count in enumerate(np.broadcast_to(counts, shape[1])):
            expected[order[:count, column], column] = True
        for below in (0, 2.0):
            monkeypatch.setattr(select, "SPARSE_BELOW", below)
            ceiling = int(expected.sum()) + 3
            found = select.columns(scores, jnp.asarray(counts), count_max=ceiling)
            if below:
                kept = np.asarray(found.keep)
                places = np.asarray(found.rows)[kept], np.asarray(found.features)[kept]
                assert (np.diff(np.ravel_multi_index(places, shape)) > 0).all()
                found = np.zeros(shape, bool)
                found[places] = True
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("below", [0, 1.0])
def test_signed_selections_keep_the_sign(below, monkeypatch):
    monkeypatch.setattr(select, "SPARSE_BELOW", below)
    x, W = np.random.default_rng(5).normal(size=(2, 8, 8)).astype(np.float32)
    zero = jnp.zeros(8)
    arrays = jnp.asarray(x), jnp.asarray(W), zero, zero
    encoder = sae_jax.products.encoder_product(*arrays, jnp.float32)
    chosen = select.rows(jnp.abs(encoder.pre), 3, count_max=3)
    for signed in (True, False):
        found = sae_jax.to_dense(select.keep(encoder, chosen, signed=signed))
        order = np.argsort(-np.abs(x @ W.T), axis=1)[:, :3]
        expected = np.zeros((8, 8), np.float32)
        np.put_along_axis(expected, order, np.take_along_axis(x @ W.T, order, 1), 1)
        expected = expected if signed else np.maximum(expected, 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_hyperparameters_may_be_negative_only_where_declared_so():
    for signed, value in ((True, -2.0), (False, -2.0), (True, float("nan"))):
        kind = sae_jax.Signed if signed else float
        fault = sae_jax.checks.value_fault("level", value, kind)
        assert (fault is None) == (signed and value == -2.0)
