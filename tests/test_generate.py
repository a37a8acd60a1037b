"""Generation: a model known by heart, a naive loop, steering, the law of the draws."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE, TrainedSAE
from sae_jax.evaluation import steering
from sae_jax.lm.edits import ablate, add
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.lm.generate import choosing_positions, generate
from sae_jax.lm.sites import Run
from sae_jax.lm.source import Source
from sae_jax.text import load_tokenizer
from tests.compilations import compilations
from tests.toys import toy_lm

VOCAB = 12
# Of two prompts; toy_lm has a context of 8.
PROMPTS = [[0, 17, 4], [0, 9]]


class Sums(Source):
    """A model that goes on with the sum of the last two tokens."""

    name, config = "sums", SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=16)
    fingerprint = "none"

    def __init__(self):
        self.passes = []

    def width(self, site):
        raise AssertionError("not asked for")

    def gradients(self, *_, **__):
        raise AssertionError("not asked for")

    def run(self, tokens, *, read=(), write=None, logits=False, losses=False):
        assert (read, logits, losses) == ((), True, False)
        self.passes.append(np.array(tokens))
        before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        chosen = (tokens + before) % VOCAB
        return Run({}, jnp.asarray(5.0 * (np.arange(VOCAB) == chosen[..., None])), None)


class Fixed(Sums):
    """The same logits wherever one looks."""

    def __init__(self, scores):
        self.scores = np.asarray(scores, np.float32)
        self.config = SimpleNamespace(vocab_size=len(scores))

    def run(self, tokens, **_):
        shape = (*tokens.shape, len(self.scores))
        return Run({}, jnp.broadcast_to(self.scores, shape), None)


def naive(lm, prompt, n_new, **edits):
    """The likeliest token, of contexts that grow, one prompt at a time."""
    row = list(prompt)
    for _ in range(n_new):
        logits = lm.run(np.array([row], np.int32), logits=True, **edits).logits
        row.append(int(np.asarray(logits)[0, -1].argmax()))
    return row[len(prompt) :]


# Which tokens -------------------------------------------------------------------------


def test_prompts_of_any_lengths_go_on_as_the_model_says():
    source = Sums()
    found = generate(source, [[1, 1], [7], [2, 3, 4, 5]], 5)
    np.testing.assert_array_equal(
        found, [[2, 3, 5, 8, 1], [7, 2, 9, 11, 8], [9, 2, 11, 1, 0]]
    )
    assert found.dtype == np.int32
    assert [p.shape for p in source.passes] == [(3, 9)] * 5, "one shape, one program"
    # What is not written yet stands on the right.
    np.testing.assert_array_equal(source.passes[1][0], [1, 1, 2, 0, 0, 0, 0, 0, 0])
    rectangle = generate(Sums(), np.array([[1, 1], [0, 7]]), 5)
    np.testing.assert_array_equal(rectangle, found[:2])


def test_a_stop_token_ends_its_row_and_fills_it():
    source = Sums()
    found = generate(source, [[1, 1], [7]], 6, stop_token=5)
    np.testing.assert_array_equal(found, [[2, 3, 5, 5, 5, 5], [7, 2, 9, 11, 8, 7]])
    source = Sums()
    found = generate(source, [[1, 1], [2, 1]], 6, stop_token=3)
    np.testing.assert_array_equal(found, [[2, 3, 3, 3, 3, 3], [3, 3, 3, 3, 3, 3]])
    assert len(source.passes) == 2, "all rows have ended"


@pytest.mark.parametrize("make", [toy_lm, lambda: toy_lm(seed=1)])
def test_the_likeliest_tokens_are_those_of_a_naive_loop(make):
    lm = make()
    found = generate(lm, PROMPTS, 5)
    assert found.tolist() == [naive(lm, prompt, 5) for prompt in PROMPTS]


def test_the_model_is_compiled_once_for_all_tokens_and_new_arrays_of_an_edit():
    config = toy_lm().config
    lm = FlaxLM.random(config, seed=2)
    with compilations("forward") as compiled:
        for seed in (0, 1):
            by = jax.random.normal(jax.random.key(seed), (16,))
            where = choosing_positions(PROMPTS, 4)
            generate(lm, PROMPTS, 4, write={"resid_post.0": add(by, where=where)})
    assert len(compiled) == 1


def test_torch_gives_the_same_text():
    pytest.importorskip("torch", reason="the PyTorch source is NOT tested")
    from sae_jax.lm.torch_lm import TorchLM

    prompts = [[0, *load_tokenizer()("def read(path):\n").input_ids], [0, 300]]
    edits = {"resid_mid.2": ablate(where=choosing_positions(prompts, 6))}
    flax, torch = FlaxLM.load(), TorchLM.load()
    for write in (None, edits):
        one, other = (generate(lm, prompts, 6, write=write) for lm in (flax, torch))
        np.testing.assert_array_equal(one, other)
    assert (generate(flax, prompts, 6) != one).any()


# Edits --------------------------------------------------------------------------------


def test_edits_stand_at_their_positions_whatever_the_prompts_lengths():
    """Against a naive loop that cuts `where` to the context that it has."""
    lm, site = toy_lm(), "resid_post.0"
    by = 4 * jax.random.normal(jax.random.key(3), (16,))
    where = choosing_positions(PROMPTS, 5)
    found = generate(lm, PROMPTS, 5, write={site: add(by, where=where)})
    for prompt, row, mask in zip(PROMPTS, found, np.asarray(where), strict=True):
        tokens = list(prompt)
        for token in row:
            cut = jnp.asarray(mask[None, : len(tokens)])
            write = {site: add(by, where=cut)}
            logits = lm.run(np.array([tokens], np.int32), logits=True, write=write)
            tokens.append(int(np.asarray(logits.logits)[0, -1].argmax()))
            assert tokens[-1] == token
    assert (found != generate(lm, PROMPTS, 5)).any()


def test_choosing_positions_begin_at_the_last_of_each_prompt():
    where = choosing_positions([[5, 6, 7], [8]], 2)
    np.testing.assert_array_equal(where, [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


# With features of an SAE --------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    lm = FlaxLM.load()
    width = lm.width("resid_post.2")
    sae = SAE(width, 256, rule="topk(k=16)", treatment="standardise")
    prompts = [
        [0, *load_tokenizer()(text).input_ids]
        for text in ("def read(path):\n    with open", "import os\n")
    ]
    return lm, TrainedSAE(sae, sae.init(jax.random.key(0))), prompts


def test_a_feature_clamped_high_changes_the_text_and_an_amount_of_0_does_not(embedded):
    lm, sae, prompts = embedded
    plain = generate(lm, prompts, 8)
    site, where = "resid_post.2", choosing_positions(prompts, 8)
    for edit, changes in (
        (steering.clamp(sae, [3], 60.0, where=where), True),
        (steering.add(sae, [3], 60.0), True),
        (steering.add(sae, [3], 0.0), False),
        (steering.add(sae, [3, 4], 0.0, where=where), False),
    ):
        steered = generate(lm, prompts, 8, write={site: edit})
        assert ((steered != plain).any(1) == changes).all()


def test_torch_takes_the_same_edits(embedded):
    pytest.importorskip("torch", reason="the PyTorch source is NOT tested")
    from sae_jax.lm.torch_lm import TorchLM

    lm, sae, prompts = embedded
    write = {"resid_post.2": steering.clamp(sae, [3, 200], [12.0, 5.0])}
    ids, site = np.array([prompts[0]], np.int32), ("resid_post.3",)
    one, other = (
        source.run(ids, read=site, write=write, logits=True)
        for source in (lm, TorchLM.load())
    )
    # Four blocks of float32, in two libraries; logits reach 30.
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-3, atol=1e-3)


# Draws --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "kept"), [(1.0, None, 5), (0.5, None, 5), (2.0, 3, 3)]
)
def test_draws_follow_the_softmax(temperature, top_k, kept):
    """800 rows of 10 tokens: shares within 4 standard errors, no token beside them."""
    scores = np.array([0.3, 2.0, -0.5, 1.5, 1.0])
    options = {"temperature": temperature, "top_k": top_k, "key": jax.random.key(4)}
    drawn = generate(Fixed(scores), [[0]] * 800, 10, **options)
    weights = np.exp(scores / temperature)
    weights[np.argsort(scores)[: 5 - kept]] = 0
    expected = weights / weights.sum()
    shares = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    error = np.sqrt(expected * (1 - expected) / drawn.size)
    assert (np.abs(shares - expected) <= 4 * error).all(), (shares, expected)
    # One step tells nothing about the next: the chance of two alike in a row.
    alike = (drawn[:, 1:] == drawn[:, :-1]).mean()
    assert abs(alike - (expected**2).sum()) < 4 * 0.5 / np.sqrt(800 * 9)


def test_draws_depend_on_the_key_alone():
    lm = toy_lm()
    one, again, other = (
        generate(lm, PROMPTS, 5, temperature=1.0, key=jax.random.key(seed))
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_the_likeliest_is_what_draws_come_to():
    lm, key = toy_lm(), jax.random.key(7)
    likeliest = generate(lm, PROMPTS, 5)
    for options in ({"temperature": 1e-4}, {"temperature": 3.0, "top_k": 1}, {}):
        found = generate(lm, PROMPTS, 5, key=key, **options)
        np.testing.assert_array_equal(found, likeliest)


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, r"prompts\[1\]"),
        ({"prompts": [1, 2]}, "needed is a list"),
        ({"prompts": ["text"]}, "token ids"),
        ({"prompts": [[1.0]]}, "float64"),
        ({"prompts": [[VOCAB]]}, "outside the vocabulary"),
        ({"n_new": 0}, "n_new=0"),
        ({"n_new": 2.0}, "must be an integer"),
        ({"n_new": 14}, "n_new=14 pass the context of 'sums', which is 16"),
        ({"temperature": -1.0}, "not negative"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": 1.0}, "pass a key"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": 2}, "top_k=2 is for draws"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": VOCAB + 1}, f"top_k={VOCAB + 1}"),
        ({"stop_token": VOCAB}, "stop_token"),
        ({"write": {"a": ablate(where=jnp.ones((1, 3), bool))}}, r"at a .*\[1, 3\].*5"),
    ],
)
def test_what_cannot_be_is_refused_before_any_pass(change, message, as_users):
    source = Sums()
    given = {"prompts": [[1, 2, 3]], "n_new": 2} | change
    with pytest.raises(ValueError, match=message):
        generate(source, given.pop("prompts"), given.pop("n_new"), **given)
    assert source.passes == []


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"n_new=0.*\n.*key.*\n.*top_k.*\n.*stop"):
        generate(Sums(), [[1]], 0, temperature=1.0, top_k=99, stop_token=-1)


def test_the_context_may_be_filled_to_the_last_token():
    assert generate(toy_lm(), PROMPTS, 5).shape == (2, 5)  # 3 + 5 of 8
    with pytest.raises(ValueError, match="pass the context"):
        generate(toy_lm(), PROMPTS, 6)
