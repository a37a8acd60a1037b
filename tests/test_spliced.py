"""SAEs spliced into a language model, against contexts that are given to it alone."""

import math
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE
from sae_jax.evaluation import Evaluator, HeldOut
from sae_jax.lm.edits import ablate, replace
from sae_jax.lm.sites import Run
from sae_jax.text.contexts import contexts
from tests.row_oracle import Case, by_hand, measure, same_scores
from tests.toys import DOCUMENTS, PACKING, TOKENS, toy_documents, toy_lm

# Losses of two float32 programs that compute the same.
LOSS = 2e-6
SITE, AIM = "resid_post.0", "mlp_out.1"


def held_out(n=7, **changes):
    return HeldOut.read(DOCUMENTS, TOKENS, PACKING._replace(**changes), n)


def identity(width=16):
    eye = np.eye(width)
    return by_hand(np.vstack([eye, -eye]), np.vstack([eye, -eye]))


def constant(row):
    """An SAE whose reconstruction is always `row`."""
    width = len(row)
    return by_hand(np.zeros((2, width)), np.zeros((2, width)), row)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max()
    return logits - math.log(np.exp(logits).sum())


def splice_one_by_one(heldout, site, values):
    """Mean loss and mean divergence, each context given to the model alone."""
    loss, divergence, n = 0.0, 0.0, 0
    for tokens, real, use, value in zip(*heldout, values, strict=True):
        edit = replace(
            jnp.asarray(value, "float32")[None], where=jnp.asarray(use)[None]
        )
        clean = toy_lm().run(tokens[None], logits=True).logits[0]
        changed = toy_lm().run(tokens[None], write={site: edit}, logits=True).logits[0]
        for t in range(len(tokens) - 1):
            if real[t + 1]:
                p, q = log_softmax(clean[t]), log_softmax(changed[t])
                loss -= q[tokens[t + 1]]
                divergence += sum(np.exp(p) * (p - q))
                n += 1
    return loss / n, divergence / n


def values_at(heldout, site):
    return np.asarray(toy_lm().run(heldout.tokens, read=(site,)).values[site])


def of_rows(scores):
    return {n: v for n, v in scores.items() if not n.startswith(("loss", "kl"))}


def test_held_out_contexts_are_the_first_of_the_text():
    heldout = held_out(5)
    first = list(islice(contexts(DOCUMENTS, TOKENS, PACKING), 5))
    for name in ("tokens", "real", "use"):
        expected = np.stack([getattr(c, name) for c in first])
        np.testing.assert_array_equal(getattr(heldout, name), expected)


@pytest.mark.parametrize("join", [True, False])
def test_every_loss_and_divergence_is_that_of_single_contexts(join):
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
    held = {"clean": x, "spliced": x_hat, "zero": 0 * x, "mean": 0 * x + mean}
    expected = {
        name: splice_one_by_one(heldout, SITE, value) for name, value in held.items()
    }
    losses = {name: loss for name, (loss, _) in expected.items()}
    assert len({round(loss, 4) for loss in losses.values()}) == 4
    for name, (loss, divergence) in expected.items():
        assert abs(scores[f"loss_{name}"] - loss) < LOSS, name
        if name == "clean":  # programs with and without a write may round apart
            assert abs(divergence) < LOSS**2
        else:
            assert divergence > 1e-3
            assert abs(scores[f"kl_{name}"] - divergence) < LOSS, name
    clean, spliced = losses["clean"], losses["spliced"]
    for name, ruin in (("", losses["zero"]), ("_mean", losses["mean"])):
        share = (ruin - spliced) / (ruin - clean)
        close = 4 * LOSS / abs(ruin - clean)
        assert abs(scores[f"loss_recovered{name}"] - share) < close, name


def test_the_rows_measured_are_the_used_ones():
    heldout = held_out(7, join=False)
    sae = SAE(16, 64, rule="topk(k=3)")
    variables = sae.init(jax.random.key(4))
    found = Evaluator(toy_lm(), heldout, contexts_per_pass=3)(sae, variables, SITE)
    x = values_at(heldout, SITE)[heldout.use]
    alone, _ = measure(Case(sae, variables, x, None))
    # float32, and epsilon is a difference.
    same_scores(of_rows(found.scores), alone.scores, 1e-4)
    assert len(found.norm_z) == heldout.use.sum()
    np.testing.assert_array_equal(found.density, alone.density)


def test_a_perfect_sae_loses_nothing():
    scores = Evaluator(toy_lm(), held_out())(*identity(), SITE).scores
    assert scores["nmse"] == 0  # x - 0 and 0 - x are exact
    assert scores["l0"] == 16
    assert abs(scores["loss_spliced"] - scores["loss_clean"]) < LOSS
    gap = abs(scores["loss_zero"] - scores["loss_clean"])
    assert abs(scores["loss_recovered"] - 1) < LOSS / gap
    assert abs(scores["kl_spliced"]) < 1e-6  # float32
    assert min(scores["kl_zero"], scores["kl_mean"]) > 1e-3


def test_an_sae_of_zeros_is_the_zero_ablation():
    heldout = held_out()
    scores = Evaluator(toy_lm(), heldout)(*constant(np.zeros(16)), SITE).scores
    assert scores["loss_spliced"] == scores["loss_zero"]  # the same program
    assert scores["kl_spliced"] == scores["kl_zero"]
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
    assert abs(scores["kl_spliced"] - scores["kl_mean"]) < LOSS
    assert abs(scores["nmse"] - 1) < 1e-6  # float32
    assert abs(scores["explained_variance_per_row"]) < 1e-5


def test_a_transcoder_reads_one_site_and_writes_another():
    heldout = held_out()
    sae = SAE(16, 64, rule="topk(k=3)", d_out=16)
    variables = sae.init(jax.random.key(4))
    x, y = (values_at(heldout, site) for site in (SITE, AIM))
    x_hat = sae.apply(variables, jnp.asarray(x.reshape(-1, 16))).x_hat
    evaluator = Evaluator(toy_lm(), heldout, contexts_per_pass=3)
    scores = evaluator(sae, variables, SITE, target_site=AIM).scores
    for name, value in (("spliced", x_hat.reshape(y.shape)), ("zero", 0 * y)):
        loss, divergence = splice_one_by_one(heldout, AIM, value)
        assert abs(scores[f"loss_{name}"] - loss) < LOSS
        assert abs(scores[f"kl_{name}"] - divergence) < LOSS
    c = Case(sae, variables, x[heldout.use], y[heldout.use])
    # float32, and epsilon is a difference.
    same_scores(of_rows(scores), measure(c)[0].scores, 1e-4)


class Known:
    """Predicts by a table: after token 0 one half and one half, after 1 3/4 and 1/4.

    Its one site holds the logarithms of these, which are its logits.
    """

    def run(self, tokens, *, read=(), write=None, logits=False, losses=False):
        table = jnp.log(jnp.array([[1 / 2, 1 / 2], [3 / 4, 1 / 4]]))
        value = table[tokens]
        if write:
            value = write["site"](value)
        log_p = jax.nn.log_softmax(value)[:, :-1]
        picked = jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], 2)
        return Run(
            {name: value for name in read},
            value if logits else None,
            -picked[..., 0] if losses else None,
        )


@pytest.mark.usefixtures("as_users")
def test_divergences_worked_by_hand():
    """An SAE that predicts 1/4 and 3/4 everywhere; zeros predict one half each.

    Predictions that count: after 0, after 1, after 1 where the site is left alone; the
    last token predicts nothing, and of the second context only one prediction is real.
    """
    heldout = HeldOut(
        np.array([[0, 1, 1, 0], [1, 0, 0, 0]]),
        np.array([[True, True, True, True], [True, True, False, False]]),
        np.array([[True, True, False, True], [True, False, False, False]]),
    )
    sae = constant(np.log([1 / 4, 3 / 4]))
    scores = Evaluator(Known(), heldout, contexts_per_pass=2)(*sae, "site").scores
    half, quarters = 0.5 * math.log(4 / 3), 0.5 * math.log(3)
    to_half = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    # Four predictions: after 0, twice after 1, and one that was not touched.
    assert abs(scores["kl_spliced"] - (half + 2 * quarters + 0) / 4) < 1e-6  # float32
    assert abs(scores["kl_zero"] - (0 + 2 * to_half + 0) / 4) < 1e-6
    # Next tokens 1, 1, 0 (left alone), and 0 in the second context.
    spliced = -(math.log(3 / 4) + math.log(3 / 4) + math.log(3 / 4) + math.log(1 / 4))
    assert abs(scores["loss_spliced"] - spliced / 4) < 1e-6
    clean = -(math.log(1 / 2) + math.log(1 / 4) + 2 * math.log(3 / 4))
    assert abs(scores["loss_clean"] - clean / 4) < 1e-6


def test_both_sources_give_the_same_scores():
    pytest.importorskip("torch")
    from sae_jax.lm.flax_lm import FlaxLM
    from sae_jax.lm.torch_lm import TorchLM

    tokens = np.random.default_rng(0).integers(1, 4096, (3, 12))
    use = np.arange(12) > np.zeros((3, 1))
    heldout = HeldOut(tokens, np.ones((3, 12), bool), use)
    sae = SAE(192, 256, rule="topk(k=8)")
    variables = sae.init(jax.random.key(0))
    ours, theirs = (
        Evaluator(lm, heldout, contexts_per_pass=2)(sae, variables, "resid_pre.2")
        for lm in (FlaxLM.load(), TorchLM.load())
    )
    assert ours.scores["kl_spliced"] > 0.01
    for name in ("kl_spliced", "kl_zero", "kl_mean", "loss_spliced", "loss_clean"):
        # Two libraries in float32.
        np.testing.assert_allclose(
            theirs.scores[name], ours.scores[name], rtol=1e-4, err_msg=name
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
    # Three passes: clean for the mean; clean, zero, mean; clean, spliced.
    assert lm.n == 3 * (1 + 3 + 2)
    again = evaluator(*identity(), SITE).scores
    assert lm.n == 3 * (1 + 3 + 2) + 3 * 2
    assert first == again
    evaluator(*identity(), AIM)
    assert lm.n == 2 * 3 * (1 + 3 + 2) + 3 * 2
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
