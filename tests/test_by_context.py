"""Errors averaged by context, of all and of special tokens, against plain loops."""

import math

import jax
import numpy as np
import pytest

from sae_jax import SAE
from sae_jax.evaluation.by_context import (
    errors_by_context,
    mean_by_context,
    special_tokens,
)
from sae_jax.text.tokenizer import load_tokenizer
from tests.toy_saes import SITE, held_out, slow, trained, values_at
from tests.toys import BOS, toy_lm


def by_loops(values, tokens, use, special=None):
    """The mean over contexts of the means over their tokens."""
    means = []
    for row, ids, used in zip(values, tokens, use, strict=True):
        wanted = [
            v
            for v, token, u in zip(row, ids, used, strict=True)
            if u and (special is None or token in special)
        ]
        if wanted:
            means.append(sum(wanted) / len(wanted))
    return sum(means) / len(means)


@pytest.mark.parametrize("treatment", ["none", "scale"])
def test_every_score_is_the_oracles(treatment):
    """Padding has the id of BOS, which is special; it counts for nothing."""
    heldout = held_out(7, use_bos=True)
    sae, variables = trained("topk(k=3)", treatment=treatment)
    codes, _, _ = slow(sae, variables, heldout)
    params = {n: np.asarray(p, np.float64) for n, p in variables.params.items()}
    x_hat = codes @ params["W_dec"] + params["b_dec"]
    if treatment == "scale":
        x_hat = x_hat / float(variables.constants["scale_out"])
    errors = np.square(values_at(heldout, SITE) - x_hat).mean(1)
    errors = errors.reshape(heldout.tokens.shape)
    use = heldout.real.copy()
    heldout = heldout._replace(use=use)
    assert 0 < use.sum() < use.size
    special = [BOS, int(heldout.tokens[2, 1])]
    found = errors_by_context(
        toy_lm(), sae, variables, SITE, heldout, special, contexts_per_pass=3
    )
    for name, ids in (("", None), ("_special", special)):
        expected = by_loops(errors, heldout.tokens, use, ids)
        np.testing.assert_allclose(found[f"mse{name}"], expected, rtol=1e-4)
        assert abs(found[f"log2_mse{name}"] - math.log2(expected)) < 1e-3
    assert found["tokens"] == use.sum() > found["tokens_special"] >= len(use)
    # The mean over all tokens alike is another number, since lengths differ.
    assert abs(found["mse"] / errors[use].mean() - 1) > 1e-3


def test_contexts_without_a_special_token_are_left_out():
    values = np.array([[1.0, 3.0, 9.0], [5.0, 7.0, 9.0], [2.0, 0.0, 0.0]])
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    assert mean_by_context(values, mask) == (2 + 2) / 2
    assert math.isnan(mean_by_context(values, np.zeros_like(mask)))


def test_the_special_tokens_are_those_of_the_tokenizer():
    tokenizer = load_tokenizer("embedded", chat_template="plain")
    messages = [{"role": r, "content": "x = 1"} for r in ("user", "assistant")]
    ids = tokenizer.apply_chat_template(messages)
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(ids)] = ids
    real = np.arange(32)[None] < len(ids)
    heldout = held_out(1)._replace(tokens=tokens, real=real, use=real)
    found = special_tokens(heldout, tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(ids)
    expected = [i for i, name in enumerate(names) if name == "<|endoftext|>"]
    assert np.flatnonzero(found[0]).tolist() == expected
    assert len(expected) == 3


def test_a_transcoder_is_refused():
    sae = SAE(16, 32, rule="topk(k=3)", d_out=16)
    variables = sae.init(jax.random.key(0))
    with pytest.raises(ValueError, match="its error is that of another site"):
        errors_by_context(toy_lm(), sae, variables, SITE, held_out(1), [0])
