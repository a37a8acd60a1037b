"""Evaluation against sums written out row by row, and against SAEs known by heart."""

import math
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE, Variables
from sae_jax.evaluation import Evaluator, HeldOut, Mean, Measurement
from sae_jax.lm.edits import ablate, replace
from sae_jax.text.contexts import contexts
from tests import oracles
from tests.toys import DOCUMENTS, PACKING, TOKENS, toy_documents, toy_lm

# Relative; float64 sums taken in another order.
EXACT = 1e-11
# Losses of two float32 programs that compute the same.
LOSS = 2e-6
SITE, AIM = "resid_post.0", "mlp_out.1"


# Rows ---------------------------------------------------------------------------------


class Case(NamedTuple):
    sae: SAE
    variables: Variables
    x: np.ndarray
    target: np.ndarray | None


def case(spec, *, n=23, d=16, f=64, **options):
    """An SAE with biases, uneven decoder rows and memory; rows off the origin."""
    rng = np.random.default_rng(5)
    sae = SAE(d, f, rule=spec, dtype="float64", **options)
    x = 1.3 * rng.normal(size=(n, d)) + 0.7
    target = 2 * rng.normal(size=(n, sae.width_out)) - 0.4
    samples = {"sample": jnp.asarray(x), "target_sample": jnp.asarray(target)}
    variables = sae.init(jax.random.key(0), **samples)
    params = {
        name: p + 0.3 * rng.normal(size=p.shape)
        for name, p in sorted(variables.params.items())
    }
    state = {name: jnp.asarray(0.9) for name in variables.state}
    if state:
        state["threshold_sum"] = jnp.asarray(0.9 * 1.5)  # a threshold of 1.5
    variables = variables._replace(params=jax.tree.map(jnp.asarray, params))
    aim = target if sae.is_transcoder else None
    return Case(sae, variables._replace(state=state), x, aim)


def mean_of(rows, mask=None):
    mean = Mean()
    mean.add(rows, mask=mask)
    return mean.finish()


def measure(c, cuts=(), mask=None, mean=None):
    """One measurement, the rows cut into batches; and the reconstructions."""
    aim = c.x if c.target is None else c.target
    mean = mean_of(aim, mask) if mean is None else mean
    measurement, x_hats = Measurement(c.sae, c.variables, mean), []
    for part in np.split(np.arange(len(c.x)), cuts):
        x_hats.append(
            measurement.add(
                jnp.asarray(c.x[part]),
                target=None if c.target is None else jnp.asarray(c.target[part]),
                mask=None if mask is None else jnp.asarray(mask[part]),
            )
        )
    return measurement.finish(), np.concatenate(x_hats)


def pass_of(c):
    """In NumPy: target, treated target, reconstruction, codes."""
    params = {name: np.asarray(p) for name, p in c.variables.params.items()}
    aim = c.x if c.target is None else c.target
    scale_in, scale_out, shift = np.ones((1, 1)), np.ones((1, 1)), 0.0
    treated, z = c.x, aim
    if c.sae.treatment == "standardise":
        treated, scale_out, shift = oracles.standardise(c.x)
        z = treated
    elif c.sae.treatment == "scale":
        scale_in, inverse = (
            math.sqrt(rows.shape[1]) / oracles.row_norms(rows).mean()
            for rows in (c.x, aim)
        )
        treated, z, scale_out = c.x * scale_in, aim * inverse, 1 / inverse
    seen = params
    if c.target is not None:
        seen = {**params, "b_dec": np.zeros(c.sae.d_in)}
    if c.variables.state:
        codes = oracles.threshold_codes(treated, seen, 1.5)
    else:
        bound = c.sae.bound
        codes = oracles.CODES[bound.rule.name](treated, seen, bound.hp)
    x_hat = (codes @ params["W_dec"] + params["b_dec"]) * scale_out + shift
    return aim, z, x_hat, codes, params


def slow_scores(aim, z, x_hat, codes, params):
    """Every score, one row after the other."""
    n, width = aim.shape
    mean = [sum(row[d] for row in aim) / n for d in range(width)]
    price = oracles.row_norms(params["W_dec"])
    bias = sum(b * b for b in params["b_dec"])
    sums = {"l0": 0.0, "error": 0.0, "spread": 0.0, "explained": 0.0, "cosine": 0.0}
    ratios, epsilons = [], []
    for a, treated, b, code in zip(aim, z, x_hat, codes, strict=True):
        error = sum((u - v) ** 2 for u, v in zip(a, b, strict=True))
        spread = sum((u - m) ** 2 for u, m in zip(a, mean, strict=True))
        lengths = math.sqrt(sum(u * u for u in a)) * math.sqrt(sum(v * v for v in b))
        sums["l0"] += sum(c != 0 for c in code)
        sums["error"] += error
        sums["spread"] += spread
        sums["explained"] += 1 - error / spread
        sums["cosine"] += sum(u * v for u, v in zip(a, b, strict=True)) / lengths
        ff = sum((c * p) ** 2 for c, p in zip(code, price, strict=True)) + bias
        zz = sum(u * u for u in treated)
        ratios.append(math.sqrt(ff / zz))
        epsilons.append(abs(zz - ff) / ((len(code) - 1) * ff))
    scores = {
        "l0": sums["l0"] / n,
        "mse": sums["error"] / n / width,
        "nmse": sums["error"] / sums["spread"],
        "explained_variance": sums["explained"] / n,
        "cosine": sums["cosine"] / n,
        "dead": sum(all(code[j] == 0 for code in codes) for j in range(codes.shape[1])),
        "norm_ratio": sorted(ratios)[n // 2],  # n is odd
        "epsilon_lbo": sorted(epsilons)[n // 2],
    }
    return scores, ratios, epsilons


def same_scores(found, expected, tolerance=EXACT):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, err_msg=name)


CASES = {
    "relu none": {"spec": "relu"},
    "relu standardise": {"spec": "relu", "treatment": "standardise"},
    "relu scale": {"spec": "relu", "treatment": "scale"},
    "sparse codes": {"spec": "topk(k=1)", "treatment": "scale"},
    "sparse codes standardise": {"spec": "topk(k=1)", "treatment": "standardise"},
    "gated": {"spec": "gated"},
    "top_afa": {"spec": "top_afa", "treatment": "standardise"},
    "matryoshka": {
        "spec": "matryoshka(k=2.0, prefixes=(0.25, 1.0))",
        "treatment": "scale",
    },
    "transcoder": {"spec": "topk(k=1)", "d_out": 12, "treatment": "scale"},
    "transcoder of gates": {"spec": "gated", "d_out": 12},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_every_score_is_the_oracles(name):
    c = case(**CASES[name])
    aim, z, x_hat, codes, params = pass_of(c)
    assert 0 < (codes != 0).mean() < 1
    found, x_hats = measure(c)
    scores, ratios, epsilons = slow_scores(aim, z, x_hat, codes, params)
    same_scores(found.scores, scores)
    np.testing.assert_allclose(x_hats, x_hat, rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(found.norm_z, oracles.row_norms(z), rtol=EXACT)
    np.testing.assert_allclose(found.norm_f / found.norm_z, ratios, rtol=EXACT)
    np.testing.assert_allclose(found.epsilon_lbo, epsilons, rtol=1e-9)  # differences
    np.testing.assert_array_equal(found.density, (codes != 0).mean(0))


def test_both_forms_of_codes_are_measured():
    dense, sparse = (SAE(16, 64, rule=r) for r in ("relu", "topk(k=1)"))
    x = jnp.ones((2, 16))
    kinds = [
        isinstance(sae.encode(sae.init(jax.random.key(0)), x), jax.Array)
        for sae in (dense, sparse)
    ]
    assert kinds == [True, False]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("spec", ["topk(k=1)", "batch_topk(k=2.0)"])
def test_it_does_not_matter_how_the_rows_are_cut(spec):
    c = case(spec, treatment="scale")
    whole, x_hat = measure(c)
    for cuts in (range(1, len(c.x)), (7, 14, 16), (16,)):
        found, again = measure(c, cuts)
        same_scores(found.scores, whole.scores)
        for counted in ("l0", "dead"):
            assert found.scores[counted] == whole.scores[counted]
        np.testing.assert_array_equal(found.density, whole.density)
        np.testing.assert_allclose(found.norm_f, whole.norm_f, rtol=EXACT)
        np.testing.assert_allclose(again, x_hat, rtol=EXACT, atol=EXACT)


@pytest.mark.usefixtures("x64")
def test_rows_that_do_not_count_leave_no_trace():
    c = case("relu", d_out=12, treatment="scale")
    mask = np.arange(len(c.x)) % 3 != 1
    mask[14:] = False  # a whole batch without a row that counts
    spoilt = c._replace(x=c.x.copy(), target=c.target.copy())
    spoilt.x[~mask], spoilt.target[~mask] = np.nan, np.inf
    found, x_hat = measure(spoilt, (7, 14), mask=mask)
    alone, x_hat_alone = measure(c._replace(x=c.x[mask], target=c.target[mask]))
    same_scores(found.scores, alone.scores)
    assert len(found.norm_z) == mask.sum()
    np.testing.assert_array_equal(found.density, alone.density)
    np.testing.assert_allclose(x_hat[mask], x_hat_alone, rtol=EXACT, atol=EXACT)
    assert np.isfinite(x_hat).all()


@pytest.mark.parametrize("treatment", ["none", "standardise", "scale"])
def test_the_reconstruction_is_that_of_apply(treatment):
    sae = SAE(16, 64, rule="topk(k=5)", treatment=treatment)
    x = 4 * jax.random.normal(jax.random.key(2), (9, 16)) + 1
    variables = sae.init(jax.random.key(0), sample=x)
    for dtype in ("float32", "bfloat16"):
        rows = x.astype(dtype)
        measurement = Measurement(sae, variables, mean_of(rows))
        x_hat, expected = measurement.add(rows), sae.apply(variables, rows).x_hat
        assert x_hat.dtype == dtype
        # One program is compiled and the other not; float32 differs in the last bits.
        wide = (np.asarray(rows).astype(np.float32) for rows in (x_hat, expected))
        np.testing.assert_allclose(*wide, rtol=1e-2 if dtype == "bfloat16" else 1e-5)


def by_hand(W_enc, W_dec, b_dec=None, *, spec="relu", **options):
    """An SAE of given matrices, float32."""
    W_enc, W_dec = jnp.asarray(W_enc, "float32"), jnp.asarray(W_dec, "float32")
    d_in, n_features = W_enc.shape
    sae = SAE(d_in, n_features, rule=spec, **options)
    variables = sae.init(jax.random.key(0))
    b_dec = jnp.zeros(W_dec.shape[1]) if b_dec is None else jnp.asarray(b_dec)
    params = {**variables.params, "W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    return sae, variables._replace(params=params)


def test_two_rows_of_two_worked_by_hand():
    """Codes [4, 0, 0], [0, 2, 0]; x_hat [2, 0], [0, 2]; mean [2, 1]."""
    W_enc, W_dec = [[1, 0, -1], [0, 1, 0]], [[0.5, 0], [0, 1], [0, 1]]
    x = np.array([[4, 0], [0, 2]], np.float32)
    found, x_hat = measure(Case(*by_hand(W_enc, W_dec), x, None))
    np.testing.assert_array_equal(x_hat, [[2, 0], [0, 2]])
    assert found.scores == {
        "l0": 1.0,
        "mse": 1.0,  # (4 + 0) / 4
        "nmse": 0.4,  # 4 / (5 + 5)
        "explained_variance": 0.6,  # of 1 - 4 / 5 and 1 - 0 / 5
        "cosine": 1.0,
        "dead": 1.0,
        "norm_ratio": 0.75,  # of 2 / 4 and 2 / 2
        "epsilon_lbo": 0.75,  # of (16 - 4) / (2 * 4) and 0
    }
    np.testing.assert_array_equal(found.norm_z, [4, 2])
    np.testing.assert_array_equal(found.norm_f, [2, 2])
    np.testing.assert_array_equal(found.epsilon_lbo, [1.5, 0])
    np.testing.assert_array_equal(found.density, [0.5, 0.5, 0])


def test_rows_count_alike_in_explained_variance_and_by_their_spread_in_nmse():
    """Negative rows give x_hat 0, others themselves; the mean of all is 0."""
    sae, variables = by_hand([[1, 0]], [[1], [1]])
    x = np.array([[-3], [-1], [4]], np.float32)
    found, _ = measure(Case(sae, variables, x, None))
    assert found.scores["nmse"] == 10 / 26  # errors 9, 1, 0; spreads 9, 1, 16
    np.testing.assert_allclose(found.scores["explained_variance"], 1 / 3, rtol=1e-7)
    assert found.scores["cosine"] == 1 / 3  # an empty reconstruction points nowhere
    x = np.array([[-3], [0], [3]], np.float32)
    found, _ = measure(Case(sae, variables, x, None))
    assert found.scores["nmse"] == 0.5
    assert math.isnan(found.scores["explained_variance"])  # 0 / 0 in the second


def test_norms_of_the_paper_on_an_orthonormal_dictionary():
    """z = f V exactly, so ||z|| = ||f||; codes twice as long: |1 - 4| / (4 (F - 1))."""
    rng = np.random.default_rng(0)
    V = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    x = np.abs(rng.normal(size=(40, 8))) @ V
    for length, expected in ((1, 0), (2, 0.75 / 7)):
        c = Case(*by_hand(length * V.T, V), x.astype(np.float32), None)
        found, _ = measure(c)
        assert abs(found.scores["epsilon_lbo"] - expected) < 1e-6  # float32
        assert abs(found.scores["norm_ratio"] - length) < 1e-6
    # The same vectors from decoder rows of length 3 and codes of a third.
    found, _ = measure(Case(*by_hand(V.T / 3, 3 * V), x.astype(np.float32), None))
    assert found.scores["epsilon_lbo"] < 1e-6


def test_empty_codes_have_an_infinite_epsilon():
    """No bias: rows below zero have norm_f 0, a row of zeros 0 / 0."""
    sae, variables = by_hand([[1, 0]], [[1], [1]])
    x = np.array([[-1], [0], [-2], [2]], np.float32)
    found, _ = measure(Case(sae, variables, x, None))
    np.testing.assert_array_equal(found.epsilon_lbo, [np.inf, np.inf, np.inf, 0])
    assert found.scores["epsilon_lbo"] == np.inf
    assert math.isnan(found.scores["norm_ratio"])


def test_a_large_common_mean_does_not_cancel():
    """Rows of spread 1 around 1000: the sum of squares is 1e6 times the spread."""
    rng = np.random.default_rng(1)
    x = (1000 + rng.normal(size=(999, 8))).astype(np.float32)
    # x_hat leaves half of x - b_dec.
    eye = np.eye(8)
    sae, variables = by_hand(
        np.hstack([eye, -eye]), np.vstack([eye, -eye]) / 2, np.full(8, 1000.0)
    )
    found, x_hat = measure(Case(sae, variables, x, None), range(100, 999, 100))
    wide = x.astype(np.float64)
    x_hat = x_hat.astype(np.float64)
    error = ((wide - x_hat) ** 2).sum(1)
    spread = ((wide - wide.mean(0)) ** 2).sum(1)
    scores = found.scores
    # float32 knows numbers near 1000 to 6e-5, and rows of 8 spread by about 3.
    np.testing.assert_allclose(scores["nmse"], error.sum() / spread.sum(), rtol=2e-5)
    expected = (1 - error / spread).mean()
    np.testing.assert_allclose(scores["explained_variance"], expected, rtol=2e-5)
    assert abs(scores["nmse"] - 0.25) < 1e-2


def test_the_mean_is_exact_however_large_and_cut():
    rng = np.random.default_rng(1)
    x = (1e4 + rng.normal(size=(5000, 3))).astype(np.float32)
    mean = Mean()
    for part in np.split(x, [1, 2, 4000]):
        mean.add(jnp.asarray(part))
    np.testing.assert_allclose(mean.finish(), x.mean(0, dtype=np.float64), rtol=1e-14)


def test_scores_without_a_spread_are_nan_and_silent():
    sae, variables = by_hand([[1, -1]], [[1], [-1]])
    for x in ([[2.0]], [[2.0]] * 3):
        found, _ = measure(Case(sae, variables, np.array(x, np.float32), None))
        nan = {name for name, value in found.scores.items() if math.isnan(value)}
        assert nan == {"nmse", "explained_variance"}


@pytest.mark.usefixtures("as_users")
def test_what_cannot_be_measured_is_refused_with_the_remedy():
    sae, variables = by_hand([[1, -1]], [[1], [-1]])
    x = jnp.ones((3, 1))
    with pytest.raises(ValueError, match=r"mean has shape \(2,\).* width 1"):
        Measurement(sae, variables, np.zeros(2))
    measurement = Measurement(sae, variables, np.zeros(1))
    with pytest.raises(ValueError, match="No rows were added"):
        measurement.finish()
    measurement.add(x, mask=np.zeros(3, bool))
    with pytest.raises(ValueError, match="or all of them are masked"):
        measurement.finish()
    with pytest.raises(ValueError, match="No rows were added"):
        Mean().finish()
    with pytest.raises(ValueError, match="NaN or infinite values in 3 of 3"):
        measurement.add(x * jnp.nan)
    with pytest.raises(ValueError, match="takes no target"):
        measurement.add(x, target=x)
    transcoder = SAE(1, 2, rule="relu", d_out=1)
    measurement = Measurement(transcoder, variables, np.zeros(1))
    with pytest.raises(ValueError, match="measured against a target"):
        measurement.add(x)


# Text ---------------------------------------------------------------------------------


def held_out(n=7, **changes):
    return HeldOut.read(DOCUMENTS, TOKENS, PACKING._replace(**changes), n)


def identity(width=16):
    eye = np.eye(width)
    return by_hand(np.hstack([eye, -eye]), np.vstack([eye, -eye]))


def constant(row):
    """An SAE whose reconstruction is always `row`."""
    width = len(row)
    return by_hand(np.zeros((width, 2)), np.zeros((2, width)), row)


def splice_one_by_one(heldout, site, values):
    """The mean loss, each context given to the model alone."""
    total, n = 0.0, 0
    for tokens, real, use, value in zip(*heldout, values, strict=True):
        edit = replace(
            jnp.asarray(value, "float32")[None], where=jnp.asarray(use)[None]
        )
        losses = toy_lm().run(tokens[None], write={site: edit}, losses=True).losses[0]
        for t in range(len(tokens) - 1):
            if real[t + 1]:
                total, n = total + float(losses[t]), n + 1
    return total / n


def values_at(heldout, site):
    return np.asarray(toy_lm().run(heldout.tokens, read=(site,)).values[site])


def test_held_out_contexts_are_the_first_of_the_text():
    heldout = held_out(5)
    first = list(islice(contexts(DOCUMENTS, TOKENS, PACKING), 5))
    for name in ("tokens", "real", "use"):
        expected = np.stack([getattr(c, name) for c in first])
        np.testing.assert_array_equal(getattr(heldout, name), expected)


@pytest.mark.parametrize("join", [True, False])
def test_every_loss_is_that_of_single_contexts(join):
    """Also where contexts end early; three passes, the last one of one context."""
    heldout = held_out(7, join=join, skip=1)
    assert heldout.real.all() == join
    assert 0 < heldout.use.sum() < heldout.real.sum()
    x = values_at(heldout, SITE)
    sae = SAE(16, 64, rule="topk(k=3)")
    variables = sae.init(jax.random.key(4))
    x_hat = sae.apply(variables, jnp.asarray(x.reshape(-1, 16))).x_hat.reshape(x.shape)
    mean = x[heldout.use].mean(0)
    evaluator = Evaluator(toy_lm(), heldout, contexts_per_pass=3)
    scores = evaluator(sae, variables, SITE).scores
    expected = {
        "loss_clean": splice_one_by_one(heldout, SITE, x),
        "loss_spliced": splice_one_by_one(heldout, SITE, x_hat),
        "loss_zero": splice_one_by_one(heldout, SITE, 0 * x),
        "loss_mean": splice_one_by_one(heldout, SITE, 0 * x + mean),
    }
    assert len({round(loss, 4) for loss in expected.values()}) == 4
    for name, loss in expected.items():
        assert abs(scores[name] - loss) < LOSS, name
    clean, spliced, zero, mean_loss = expected.values()
    for name, ruin in (("loss_recovered", zero), ("loss_recovered_mean", mean_loss)):
        share = (ruin - spliced) / (ruin - clean)
        assert abs(scores[name] - share) < 4 * LOSS / abs(ruin - clean), name


def test_the_rows_measured_are_the_used_ones():
    heldout = held_out(7, join=False)
    sae = SAE(16, 64, rule="topk(k=3)")
    variables = sae.init(jax.random.key(4))
    found = Evaluator(toy_lm(), heldout, contexts_per_pass=3)(sae, variables, SITE)
    x = values_at(heldout, SITE)[heldout.use]
    alone, _ = measure(Case(sae, variables, x, None))
    rest = {n: v for n, v in found.scores.items() if not n.startswith("loss")}
    same_scores(rest, alone.scores, 1e-4)  # float32, and epsilon is a difference
    assert len(found.norm_z) == heldout.use.sum()
    np.testing.assert_array_equal(found.density, alone.density)


def test_a_perfect_sae_loses_nothing():
    scores = Evaluator(toy_lm(), held_out())(*identity(), SITE).scores
    assert scores["nmse"] == 0  # x - 0 and 0 - x are exact
    assert scores["l0"] == 16
    assert abs(scores["loss_spliced"] - scores["loss_clean"]) < LOSS
    gap = abs(scores["loss_zero"] - scores["loss_clean"])
    assert abs(scores["loss_recovered"] - 1) < LOSS / gap


def test_an_sae_of_zeros_is_the_zero_ablation():
    heldout = held_out()
    scores = Evaluator(toy_lm(), heldout)(*constant(np.zeros(16)), SITE).scores
    assert scores["loss_spliced"] == scores["loss_zero"]  # the same program
    assert scores["loss_recovered"] == 0
    assert scores["dead"] == 2
    write = {SITE: ablate(where=jnp.asarray(heldout.use))}
    losses = np.asarray(toy_lm().run(heldout.tokens, write=write, losses=True).losses)
    assert abs(scores["loss_zero"] - losses[heldout.real[:, 1:]].mean()) < LOSS


def test_an_sae_of_the_mean_is_the_mean_ablation():
    heldout = held_out()
    mean = values_at(heldout, SITE)[heldout.use].mean(0)
    scores = Evaluator(toy_lm(), heldout)(*constant(mean), SITE).scores
    gap = abs(scores["loss_mean"] - scores["loss_clean"])
    assert abs(scores["loss_recovered_mean"]) < LOSS / gap
    assert abs(scores["nmse"] - 1) < 1e-6  # float32
    assert abs(scores["explained_variance"]) < 1e-5


def test_a_transcoder_reads_one_site_and_writes_another():
    heldout = held_out()
    sae = SAE(16, 64, rule="topk(k=3)", d_out=16)
    variables = sae.init(jax.random.key(4))
    x, y = (values_at(heldout, site) for site in (SITE, AIM))
    x_hat = sae.apply(variables, jnp.asarray(x.reshape(-1, 16))).x_hat
    evaluator = Evaluator(toy_lm(), heldout, contexts_per_pass=3)
    scores = evaluator(sae, variables, SITE, target_site=AIM).scores
    spliced = splice_one_by_one(heldout, AIM, x_hat.reshape(y.shape))
    zero = splice_one_by_one(heldout, AIM, 0 * y)
    assert abs(scores["loss_spliced"] - spliced) < LOSS
    assert abs(scores["loss_zero"] - zero) < LOSS
    c = Case(sae, variables, x[heldout.use], y[heldout.use])
    same_scores(
        {n: v for n, v in scores.items() if not n.startswith("loss")},
        measure(c)[0].scores,
        1e-4,  # float32, and epsilon is a difference
    )


class Counting:
    """A model that counts its passes and the shapes that it is given."""

    def __init__(self):
        self.n, self.shapes = 0, set()

    def run(self, tokens, **options):
        self.n += 1
        self.shapes.add(tokens.shape)
        return toy_lm().run(tokens, **options)


@pytest.mark.usefixtures("as_users")
def test_what_does_not_depend_on_the_sae_is_computed_once():
    lm = Counting()
    evaluator = Evaluator(lm, held_out(7), contexts_per_pass=3)
    first = evaluator(*identity(), SITE).scores
    assert lm.n == 3 * (3 + 2)  # three passes: clean, zero, mean; read, splice
    again = evaluator(*identity(), SITE).scores
    assert lm.n == 3 * (3 + 2) + 3 * 2
    assert first == again
    evaluator(*identity(), AIM)
    assert lm.n == 2 * 3 * (3 + 2) + 3 * 2
    assert lm.shapes == {(3, 8)}


def test_a_site_that_nothing_depends_on_recovers_nan():
    """The last block's residual at a position that predicts nothing."""
    heldout = held_out(2)
    last = heldout._replace(use=np.arange(8) == np.full((2, 1), 7))
    scores = Evaluator(toy_lm(), last)(*identity(), "resid_post.1").scores
    assert scores["loss_clean"] == scores["loss_zero"]
    assert math.isnan(scores["loss_recovered"])
    assert math.isnan(scores["loss_recovered_mean"])
    alone = heldout._replace(real=np.arange(8) == np.zeros((2, 1)))
    scores = Evaluator(toy_lm(), alone)(*identity(), SITE).scores
    assert math.isnan(scores["loss_clean"])


@pytest.mark.usefixtures("as_users")
def test_bad_questions_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="n_contexts=0; at least one"):
        held_out(0)
    with pytest.raises(ValueError, match=r"n_contexts=99.* has \d+ of 8 tokens; ask"):
        HeldOut.read(toy_documents(), TOKENS, PACKING, 99)
    heldout = held_out(2)
    with pytest.raises(ValueError, match="contexts_per_pass=0"):
        Evaluator(toy_lm(), heldout, contexts_per_pass=0)
    with pytest.raises(ValueError, match=r"No position .* is used"):
        Evaluator(toy_lm(), heldout._replace(use=heldout.use & False))
    evaluator = Evaluator(toy_lm(), heldout)
    transcoder = SAE(16, 32, rule="relu", d_out=16)
    with pytest.raises(ValueError, match=r"target_site=None .* a transcoder needs"):
        evaluator(transcoder, identity()[1], SITE)
    with pytest.raises(ValueError, match="an autoencoder takes none"):
        evaluator(*identity(), SITE, target_site=AIM)
    with pytest.raises(ValueError, match=r"width 8; give the mean of those"):
        evaluator(*identity(8), SITE)
