"""Dictionaries against known attributes: supervised ones, and the three tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from experiments._principled_saes import FrozenDecoder
from sae_jax.analysis.places import Place, predictions, read
from sae_jax.analysis.principled import control, interpretability, phenomena
from sae_jax.analysis.principled.approximation import approximation, scores
from sae_jax.analysis.principled.sparse import decomposed
from sae_jax.analysis.principled.supervised import (
    Decomposed,
    by_least_squares,
    by_means,
    fvu,
)
from sae_jax.analysis.prompts import changed, draw
from sae_jax.analysis.tasks import TASKS
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.text.tokenizer import load_tokenizer
from tests import principled_oracles as oracle

SIZES = {"io": 20, "s": 20, "pos": 2}


def attributed(correlated=0.0, n=4000, d=32, seed=0):
    """Rows a = u_io + u_s + u_pos + 3 + .1 noise, their labels, and the true u."""
    rng = np.random.default_rng(seed)
    u = {name: rng.normal(size=(size, d)) for name, size in SIZES.items()}
    values = {name: rng.integers(size, size=n) for name, size in SIZES.items()}
    same = rng.random(n) < correlated
    values["s"] = np.where(same, values["io"], values["s"])
    rows = sum(u[name][v] for name, v in values.items())
    return rows + 3 + 0.1 * rng.normal(size=(n, d)), values, u


# Supervised dictionaries.


def test_supervised_dictionaries_are_the_slow_ones():
    rows, values, _ = attributed(0.5, n=300)
    means = by_means(rows, values, SIZES)
    slow, mean = oracle.mean_dictionary(rows, values)
    np.testing.assert_allclose(means.mean, mean)
    for (name, v), direction in slow.items():
        np.testing.assert_allclose(means.of(name)[v], direction, atol=1e-9)
    fitted = by_least_squares(rows, values, SIZES)
    slow_fit = oracle.least_squares_fit(rows, values)
    np.testing.assert_allclose(fitted(values).x_hat, slow_fit, atol=1e-8)
    np.testing.assert_allclose(fitted.mean, mean)
    for name in SIZES:  # the bias is the mean, whatever least squares leave open
        total = fitted.of(name)[values[name]].sum(0)
        np.testing.assert_allclose(total, 0, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_supervised_dictionaries_leave(seed):
    rows, values, _ = attributed(seed=seed)
    means = by_means(rows, values, SIZES)
    fitted = by_least_squares(rows, values, SIZES)
    assert fvu(rows, means(values).x_hat) <= 0.02
    assert fvu(rows, fitted(values).x_hat) <= 0.006


@pytest.mark.parametrize("seed", [0, 1])
def test_attributes_that_go_together_mislead_the_mean_dictionary_alone(seed):
    rows, values, _ = attributed(0.8, seed=seed)
    assert fvu(rows, by_means(rows, values, SIZES)(values).x_hat) > 0.3
    assert fvu(rows, by_least_squares(rows, values, SIZES)(values).x_hat) <= 0.006


def test_an_attribute_is_edited_by_one_exchange():
    rows, values, u = attributed()
    new = (values["io"] + 1) % 20
    aim = rows + u["io"][new] - u["io"][values["io"]]
    dictionary = by_means(rows, values, SIZES)
    both = dictionary(values), dictionary({**values, "io": new})
    edit = control.greedy(rows, aim, *both, 2)
    old = np.sort(np.stack([values["io"], new], 1), 1)
    np.testing.assert_array_equal(np.sort(edit.chosen, 1), old)
    edited = control.exchanged(rows, *both, edit.chosen)
    left = np.square(edited - aim).sum() / np.square(rows - aim).sum()
    assert left <= 0.02


def test_a_value_without_rows_is_zero():
    rows, values, _ = attributed(n=200)
    kept = values["io"] != 4
    some = {name: v[kept] for name, v in values.items()}
    for fit in (by_means, by_least_squares):
        dictionary = fit(rows[kept], some, SIZES)
        assert not dictionary.of("io")[4].any()
        assert np.isfinite(dictionary(values).x_hat).all()
    with pytest.raises(ValueError, match="'x' is none of io, s, pos"):
        dictionary.of("x")


# Sparse control.


def sparse_rows(n=40, n_features=9, d=6, seed=0):
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(n_features, d))
    active = rng.random((2, n, n_features)) < 0.5
    f_s, f_t = active * rng.uniform(0.5, 1.5, active.shape)
    bias = rng.normal(size=(1, d))
    source, target = (Decomposed(f, directions, bias) for f in (f_s, f_t))
    a_s = source.x_hat + 0.3 * rng.normal(size=(n, d))
    a_t = target.x_hat + 0.3 * rng.normal(size=(n, d))
    return a_s, a_t, source, target


def test_greedy_edits_are_the_slow_ones_and_brute_force_for_one_feature():
    a_s, a_t, source, target = sparse_rows()
    edit = control.greedy(a_s, a_t, source, target, 9)
    edited = control.exchanged(a_s, source, target, edit.chosen[:, :4])
    found = control.removed_weight(source, edit.chosen[:, :4])
    for i in range(len(a_s)):
        one = a_s[i], a_t[i], source.strengths[i], target.strengths[i]
        chosen, distances, _ = oracle.greedy(*one, source.directions, 9)
        assert edit.chosen[i][edit.chosen[i] >= 0].tolist() == chosen
        np.testing.assert_allclose(edit.distance[i], distances)
        np.testing.assert_allclose(
            edit.distance[i, 1], oracle.best_exchange(*one, source.directions, 1)
        )
        assert edit.distance[i, 2] >= (
            oracle.best_exchange(*one, source.directions, 2) - 1e-9
        )
        np.testing.assert_allclose(
            edited[i], oracle.greedy(*one, source.directions, 4)[2]
        )
        removed = sum(
            oracle.weight(source.strengths[i], source.directions, j) for j in chosen[:4]
        )
        np.testing.assert_allclose(found[i], removed, atol=1e-12)


def test_the_distance_never_grows_and_features_are_used_once():
    a_s, a_t, source, target = sparse_rows(seed=1)
    edit = control.greedy(a_s, a_t, source, target, 9)
    assert (np.diff(edit.distance, axis=1) <= 0).all()
    assert (edit.chosen == control.NONE).any()  # where nothing helps any more
    for row in edit.chosen:
        taken = row[row >= 0]
        assert len(set(taken.tolist())) == len(taken)
    np.testing.assert_array_equal(
        control.exchanged(a_s, source, target, edit.chosen[:, :0]), a_s
    )


def test_weights_sum_to_one_and_a_code_of_zeros_has_none():
    *_, source, _ = sparse_rows()
    np.testing.assert_allclose(control.weights(source).sum(1), 1)
    nothing = source._replace(strengths=np.zeros_like(source.strengths))
    assert not control.weights(nothing).any()


def test_the_features_of_the_highest_scores_are_exchanged_if_active():
    *_, source, target = sparse_rows()
    scores_s, scores_t = np.random.default_rng(3).random((2, *source.strengths.shape))
    moved = control.highest(source, target, scores_s, scores_t, 2)
    for i in range(len(moved)):
        slow = 0
        for sign, row, score in ((1, target, scores_t), (-1, source, scores_s)):
            f = row.strengths[i]
            active = [j for j in np.argsort(-score[i]) if f[j]]
            slow = slow + sign * sum(f[j] * row.directions[j] for j in active[:2])
        np.testing.assert_allclose(moved[i], slow, atol=1e-12)
    every = control.highest(source, target, scores_s, scores_t, 100)
    np.testing.assert_allclose(every, target.x_hat - source.x_hat, atol=1e-9)


@pytest.mark.parametrize("treatment", ["none", "scale", "standardise"])
def test_edits_are_in_the_units_of_the_rows_whatever_the_treatment(treatment):
    """All features exchanged: the source's own error stays, the rest is the target."""
    rng = np.random.default_rng(0)
    rows = (5 + 3 * rng.normal(size=(2, 30, 16))).astype(np.float32)
    sae = sae_jax.SAE(16, 40, rule="topk(k=6)", treatment=treatment)
    variables = sae.init(jax.random.key(0), sample=jnp.asarray(rows[0]))
    variables.params["b_dec"] = jnp.arange(16.0) / 10
    one = sae_jax.TrainedSAE(sae, variables)
    source, target = (decomposed(one, x, at_once=7) for x in rows)
    for x, found in zip(rows, (source, target), strict=True):
        np.testing.assert_allclose(found.x_hat, one(x)[0], atol=2e-5)
    every = np.tile(np.arange(40), (30, 1))
    edited = control.exchanged(rows[0], source, target, every)
    x_hats = [np.asarray(one(x)[0]) for x in rows]
    moved = edited - (rows[0] - x_hats[0])
    np.testing.assert_allclose(moved - source.bias, x_hats[1] - target.bias, atol=1e-4)


def test_a_transcoder_has_no_features_of_what_it_reads():
    sae = sae_jax.SAE(16, 40, rule="topk(k=6)", d_out=8)
    one = sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0)))
    with pytest.raises(ValueError, match="is a transcoder"):
        decomposed(one, np.ones((3, 16), np.float32))


# Interpretability.


def labelled(n=600, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(size, size=n) for name, size in SIZES.items()}


def test_f1_of_features_that_are_known():
    values = labelled()
    p = (values["io"] == 3).mean()
    active = np.stack(
        [values["io"] == 3, np.ones(600, bool), np.zeros(600, bool)], axis=1
    )
    found = interpretability.of_values(active, values, SIZES)["io"]
    assert found[0, 3] == 1
    np.testing.assert_allclose(found[1, 3], 2 * p / (1 + p))
    assert not found[2].any()
    nobody = {"io": np.zeros(600, int)}  # a value that no prompt has, a silent feature
    assert interpretability.of_values(active, nobody, {"io": 2})["io"][2, 1] == 0
    assert interpretability.f1(0.0, np.zeros(3), np.zeros(3)).tolist() == [0, 0, 0]


def test_properties_are_the_slow_ones_and_found_where_planted():
    values, other = labelled(seed=1), labelled(seed=2)

    def fires(v):
        return np.stack(
            [
                v["io"] == 3,
                np.isin(v["s"], [1, 5, 9]),
                (v["io"] == 2) & (v["pos"] == 1),
                v["pos"] == 0,
                np.zeros(len(v["io"]), bool),
            ],
            axis=1,
        )

    found = interpretability.meaning(fires(values), values, fires(other), other, SIZES)
    assert [p and dict(p.values) for p in found.chosen] == [
        {"io": (3,)},
        {"s": (1, 5, 9)},
        {"io": (2,), "pos": (1,)},
        {"pos": (0,)},
        None,
    ]
    np.testing.assert_allclose(found.f1, [1, 1, 1, 1, 0])
    choices = {name: [f"v{i}" for i in range(n)] for name, n in SIZES.items()}
    assert found.chosen[1] is not None
    assert found.chosen[1].text(choices) == "s is 'v1' or 'v5' or 'v9'"
    # Noisy features, against the slow versions on the same prompts.
    noisy = fires(values) ^ (np.random.default_rng(0).random((600, 5)) < 0.1)
    found = interpretability.meaning(noisy, values, noisy, values, SIZES, most=4)
    for j in range(5):
        best = max(
            oracle.best_union(noisy[:, j], values[name], size, 4)[0]
            for name, size in SIZES.items()
        )
        for name in ("io", "s"):
            for v in range(20):
                for w in range(2):
                    both = (values[name] == v) & (values["pos"] == w)
                    best = max(best, oracle.f1(noisy[:, j], both))
        np.testing.assert_allclose(found.f1[j], best)


def test_shuffled_labels_tell_little():
    values, other = labelled(seed=1), labelled(seed=2)
    active, other_active = (np.eye(20, dtype=bool)[v["io"]] for v in (values, other))
    real = interpretability.meaning(active, values, other_active, other, SIZES)
    lots = (interpretability.shuffled(v, seed=i) for i, v in enumerate((values, other)))
    first, second = lots
    chance = interpretability.meaning(active, first, other_active, second, SIZES)
    assert (real.f1 == 1).all()
    assert chance.f1.mean() < 0.15
    assert sorted(first["io"].tolist()) == sorted(values["io"].tolist())


# Occlusion and over-splitting.


def test_a_value_that_is_split_among_features_is_counted():
    holds = np.arange(100) < 50
    whole = holds[:, None]
    fifths = (np.arange(100)[:, None] // 10 == np.arange(5)) & whole
    dense = np.ones((100, 1), bool)
    assert phenomena.split(whole, holds) == (1, 1.0, 1, 1.0)
    assert phenomena.split(fifths, holds) == (5, 0.2, 5, 1.0)
    assert phenomena.split(np.hstack([fifths, whole]), holds)[:3] == (6, 1.0, 1)
    assert phenomena.split(fifths[:, :4], holds) == (4, 0.2, -1, 0.8)
    assert phenomena.split(dense, holds) == (0, 0.0, -1, 0.0)
    assert phenomena.split(whole, ~holds) == (0, 0.0, -1, 0.0)
    assert phenomena.split(whole, np.zeros(100, bool)) == (0, 0.0, -1, 0.0)


def test_shares_and_rescaled_attributes():
    rows, values, _ = attributed()
    fitted = by_least_squares(rows, values, SIZES)
    shares = phenomena.shares(fitted, rows, values)
    # 20 values of 32 normal numbers have 19/20 of their square about their mean.
    assert shares["io"] + shares["s"] + shares["pos"] == pytest.approx(1, abs=0.02)
    assert shares["pos"] < shares["io"] == pytest.approx(0.4, abs=0.1)
    louder = phenomena.scaled(fitted, rows, values, "pos", 3.0)
    again = by_least_squares(louder, values, SIZES)
    np.testing.assert_allclose(again.of("pos"), 3 * fitted.of("pos"), atol=1e-6)
    np.testing.assert_allclose(again.of("io"), fitted.of("io"), atol=1e-6)


# In a language model.


@pytest.fixture(scope="module")
def lm():
    return FlaxLM.load("embedded")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def test_the_embedded_model_does_the_tasks(lm, tokenizer):
    for name, least in (("close", 0.8), ("assign", 0.95)):
        prompts = draw(TASKS[name].task, tokenizer, 64, seed=11)
        found = predictions(lm, prompts)
        assert (found.token == prompts.answer).mean() >= least
        assert (found.among == prompts.answer).mean() >= 0.97
        assert (found.difference > 0).mean() >= 0.97


def test_what_is_patched_decides(lm, tokenizer):
    for name, attribute in (("close", "quote"), ("close", "kind"), ("assign", "name")):
        known = TASKS[name]
        places = [Place.parse(text) for text in known.places]
        prompts = draw(known.task, tokenizer, 64, seed=5)
        other = changed(prompts, tokenizer, attribute)
        clean, rows = read(lm, prompts, places), read(lm, other, places)
        same = predictions(lm, prompts, clean)
        plain = predictions(lm, prompts)
        np.testing.assert_array_equal(same.token, plain.token)
        np.testing.assert_allclose(same.difference, plain.difference, atol=1e-4)
        found = predictions(lm, prompts, rows)
        assert (found.among == other.answer).mean() >= 0.9
        assert (plain.among == other.answer).mean() <= 0.1


def test_places_of_single_heads_are_parts_of_their_site(lm, tokenizer):
    prompts = draw(TASKS["assign"].task, tokenizer, 50)
    whole = Place.parse("head_out.3@name.2")
    heads = [Place.parse(f"head_out.3/{h}@name.2") for h in range(6)]
    rows = read(lm, prompts, [whole, *heads], per_pass=50)
    parts = np.concatenate([rows[head] for head in heads], 1)
    np.testing.assert_array_equal(parts, rows[whole])
    at = prompts.positions["name.2"]
    values = lm.run(prompts.tokens, read=("head_out.3",)).values["head_out.3"]
    np.testing.assert_allclose(
        rows[whole], np.asarray(values)[np.arange(50), at], atol=1e-5
    )
    again = read(lm, prompts, [whole], per_pass=32)  # the last pass is filled up
    np.testing.assert_allclose(again[whole], rows[whole], atol=1e-5)
    # All heads without output leave of attention its bias.
    ends = [Place("head_out.3", "end", h) for h in range(6)]
    zeros = {p: np.zeros((50, 32), np.float32) for p in ends}
    bias = lm.params["transformer"]["h"]["3"]["attn"]["c_proj"]["bias"]
    site = {Place("attn_out.3"): np.tile(np.asarray(bias), (50, 1))}
    found = [predictions(lm, prompts, new, per_pass=32) for new in (zeros, site)]
    np.testing.assert_allclose(found[0].difference, found[1].difference, atol=1e-3)
    assert (found[0].token == found[1].token).all()


def test_places_that_do_not_exist(lm, tokenizer):
    prompts = draw(TASKS["assign"].task, tokenizer, 4)
    for text in ("@end", "resid_post.1/3@end", "head_out.1/x"):
        with pytest.raises(ValueError, match="is neither"):
            Place.parse(text)
    assert str(Place.parse("head_out.1/3@name.2")) == "head_out.1/3@name.2"
    for text, fault in (
        ("resid_post.1@nme", "Unknown position 'nme'"),
        ("head_out.1/6@end", "has 6 heads, from 0 on"),
    ):
        with pytest.raises(ValueError, match=fault):
            read(lm, prompts, [Place.parse(text)])
    where = {**prompts.positions, "name": np.array([3, -1, 3, 3])}
    with pytest.raises(ValueError, match="no name in"):
        read(lm, prompts._replace(positions=where), [Place("resid_post.1", "name")])


def test_perfect_and_useless_reconstructions(lm, tokenizer):
    prompts = draw(TASKS["close"].task, tokenizer, 64)
    places = [Place("resid_post.2")]
    rows = read(lm, prompts, places)
    mean = {p: x.mean(0) for p, x in rows.items()}
    perfect = approximation(lm, prompts, rows, rows, mean)
    names = ("sufficiency", "sufficiency_over_mean", "necessity", "necessity_distance")
    for name in names:
        assert perfect[name] == pytest.approx(1, abs=1e-3)
    none = {p: np.broadcast_to(mean[p], x.shape) for p, x in rows.items()}
    useless = approximation(lm, prompts, rows, none, mean)
    for name in names[1:]:
        assert useless[name] == pytest.approx(0, abs=1e-3)
    assert useless["ld_mean"] < 0.3 * useless["ld_clean"]
    half = scores(4.0, -1.0, 2.0, 1.5)
    assert half == {
        "sufficiency": 0.5,
        "sufficiency_over_mean": 0.6,
        "necessity": 0.5,
        "necessity_distance": 0.5,
    }
    assert scores(4.0, -1.0, 2.0, -2.0)["necessity_distance"] == 0.8
    assert scores(4.0, -1.0, 2.0, -2.0)["necessity"] == 1.2


def test_a_frozen_decoder_stays_as_it_was_drawn():
    optimiser = FrozenDecoder(steps=5, lr=1e-2).optimiser()
    sae = sae_jax.SAE(8, 16, rule="topk(k=2)")
    params = sae.init(jax.random.key(0)).params
    updates, _ = optimiser.update(
        jax.tree.map(jnp.ones_like, params), optimiser.init(params), params
    )
    moved = {name: float(jnp.abs(update).max()) for name, update in updates.items()}
    assert moved.pop("W_dec") == 0
    assert min(moved.values()) > 1e-3
