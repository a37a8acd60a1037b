"""The training of the embedded model: baselines by hand, and resuming."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import _counting, train_lm
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.text import corpus


def naive_bigram(tokens, rows, vocab_size, mix):
    """(n_ab + m p_b) / (n_a + m), counted one pair at a time."""
    counts = [1 + list(tokens).count(b) for b in range(vocab_size)]
    losses = []
    for row in rows:
        for a, b in itertools.pairwise(row):
            pairs = list(itertools.pairwise(tokens))
            p_b = counts[b] / sum(counts)
            above = pairs.count((a, b)) + mix * p_b
            losses.append(-np.log(above / ([x for x, _ in pairs].count(a) + mix)))
    return np.mean(losses)


def test_the_bigram_baseline_is_the_best_of_its_smoothings():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 7, 80).astype(np.int32)
    validation = random.integers(0, 7, (3, 9)).astype(np.int32)
    heldout = random.integers(0, 7, (4, 9)).astype(np.int32)
    bigram, mix = _counting.fit_bigram(tokens, validation, 7)
    expected = naive_bigram(tokens, heldout, 7, mix)
    np.testing.assert_allclose(bigram(heldout).mean(), expected)
    best = naive_bigram(tokens, validation, 7, mix)
    for other in (mix / 2, mix * 2):
        if 0.25 <= other <= 4096:
            assert naive_bigram(tokens, validation, 7, other) >= best


def test_the_unigram_baseline_by_hand():
    unigram = _counting.fit_unigram(np.array([0, 0, 0, 1]), 3)
    losses = unigram(np.array([[2, 0, 1, 2]]))
    np.testing.assert_allclose(losses, -np.log([[4 / 7, 2 / 7, 1 / 7]]))


@pytest.fixture
def small(monkeypatch, tmp_path):
    texts = {part: [f"def f{i}(x): return x + {i}\n" * 9 for i in range(9)]
             for part in corpus.PARTS}  # fmt: skip
    monkeypatch.setattr(corpus, "documents", lambda part: iter(texts[part]))
    return lambda name: train_lm.Config(
        out=str(tmp_path / name), vocab_size=300, layers=1, width=16, heads=2,
        context=32, batch=2, steps=6, warmup=2, eval_every=2,
    )  # fmt: skip


def test_a_training_that_was_killed_ends_with_the_same_weights(small, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 300, 640).astype(np.int32)

    def train(name: str):
        (tmp_path / name).mkdir(exist_ok=True)
        config = small(name)
        model = train_lm.new_model(config)
        return train_lm.train(config, model, tokens, tokens[:64])

    whole = train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "6")
    jax.tree.map(np.testing.assert_array_equal, whole, train("killed"))
    log = (tmp_path / "killed" / "loss.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [2, 4, 6]


def test_what_it_writes_is_what_the_package_loads(small, tmp_path):
    report = train_lm.run(small("model"))
    lm = FlaxLM.load(str(tmp_path / "model" / "model"))
    tokenizer = train_lm.get_tokenizer(tmp_path / "model" / "model", 300)
    flat = train_lm.flat_tokens(tokenizer, "heldout")
    rows = train_lm.windows(flat.tokens, 32)
    loss = float(lm.run(rows, losses=True).losses.mean())
    np.testing.assert_allclose(loss, report["nats_per_token"]["model"], rtol=1e-5)
