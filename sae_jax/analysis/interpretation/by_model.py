"""Scores of explanations that need a model, but no judge.

    surprisal     explanation before the text: does it make the text of windows in which
                  the feature fires less surprising than that of others?
    embedding     is the explanation nearer to windows in which it fires?
    intervention  does a model that goes on with the feature held high write what the
                  explanation says?

Paulo et al. 2024. The first two are areas under the ROC curve, .5 for an explanation
that says nothing. The third, from texts i with and g without intervention,

    mean over contexts of  log p(explanation | i) - log p(explanation | g)

in nats, is 0 for an edit that does nothing; features are comparable at the same
strength only, which `strength_for` finds: the mean KL(clean || edited) of the
predictions.

Differs: the first token's loss counts; the paper's code drops it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_jax.analysis.interpretation.windows import Examples
from sae_jax.analysis.ranking import auroc
from sae_jax.evaluation.heldout import divergences
from sae_jax.lm.edits import Edit
from sae_jax.lm.generate import generate
from sae_jax.lm.source import Source

Embed = Callable[[Sequence[str]], Float[np.ndarray, "n D"]]
NOTHING = "Various unrelated sentences."
THEN = "\n\n"  # between an explanation and a text
DOUBLINGS = 20


def surprisal(
    lm: Source, tokenizer: Any, explanation: str, examples: Examples
) -> float:
    """Area under the ROC curve of the decrease in loss; `lm` is any source."""

    def decrease(tokens: Int[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
        told, untold = (
            losses_after(lm, tokenizer, f"{before}{THEN}", tokens)
            for before in (explanation, NOTHING)
        )
        return untold - told

    if not len(examples.on.tokens) or not len(examples.off.tokens):
        return math.nan
    return auroc(decrease(examples.on.tokens), decrease(examples.off.tokens))


def losses_after(
    lm: Source, tokenizer: Any, before: str, tokens: Int[np.ndarray, "n L"]
) -> Float[np.ndarray, " n"]:
    """Mean loss of the tokens of each row, in nats, after a text."""
    head = encoded(tokenizer, before)
    rows = np.concatenate(
        [np.tile(head, (len(tokens), 1)), tokens.astype(np.int32)], axis=1
    )
    lm.require_fit(rows)
    losses = np.asarray(lm.run(rows, losses=True).losses, np.float64)
    return losses[:, len(head) - 1 :].mean(1)


def encoded(tokenizer: Any, text: str) -> Int[np.ndarray, " n"]:
    """BOS and the tokens of a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.array([tokenizer.bos_token_id, *ids], np.int32)


def embedding(
    embed: Embed, explanation: str, examples: Examples, texts: Callable[[Any], str]
) -> float:
    """Area under the ROC curve of the cosine with the explanation.

    `texts` makes the text of a window from its tokens.
    """
    on, off = ([texts(row) for row in part.tokens] for part in examples[-2:])
    if not on or not off:
        return math.nan
    vectors = np.asarray(embed([explanation, *on, *off]), np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = vectors[1:] @ vectors[0]
    return auroc(cosines[: len(on)], cosines[len(on) :])


def intervention(
    lm: Source,
    tokenizer: Any,
    explanation: str,
    edit: Edit,
    site: str,
    contexts: Int[np.ndarray, "n L"],
    *,
    n_new: int = 16,
    ask: str = f"{THEN}This text is about: ",
) -> float:
    """How much likelier the explanation becomes after text written under the edit.

    The model goes on from each context, greedily, with and without the edit; then it
    is asked, without any edit, what the new text is about.
    """
    clean = generate(lm, contexts, n_new)
    edited = generate(lm, contexts, n_new, write={site: edit})
    question = tokenizer(ask, add_special_tokens=False)["input_ids"]
    answer = tokenizer(explanation, add_special_tokens=False)["input_ids"]

    def log_p(new: Int[np.ndarray, "n N"]) -> Float[np.ndarray, " n"]:
        tail = np.tile(np.array([*question, *answer], np.int32), (len(new), 1))
        bos = np.full((len(new), 1), tokenizer.bos_token_id, np.int32)
        rows = np.concatenate([bos, new, tail], axis=1)
        lm.require_fit(rows)
        losses = np.asarray(lm.run(rows, losses=True).losses, np.float64)
        return -losses[:, -len(answer) :].sum(1)

    return float((log_p(edited) - log_p(clean)).mean())


def strength_for(
    lm: Source,
    make: Callable[[float], Edit],
    site: str,
    contexts: Int[np.ndarray, "n L"],
    *,
    divergence: float,
    start: float = 1.0,
    rounds: int = 12,
) -> float:
    """The strength at which an edit changes predictions by a mean KL, in nats.

    `make(strength)` is the edit. Found by doubling, then by halving the interval;
    refused where the divergence is not reached.
    """
    clean = lm.run(contexts, logits=True).logits

    def change(strength: float) -> float:
        run = lm.run(contexts, write={site: make(strength)}, logits=True)
        return float(np.asarray(divergences(clean, run.logits)).mean())

    low, high = 0.0, start
    for _ in range(DOUBLINGS):
        if change(high) >= divergence:
            break
        low, high = high, 2 * high
    else:
        raise ValueError(
            f"no strength up to {high:g} changes the predictions by {divergence} nats; "
            f"ask for less, or for a feature that matters more."
        )
    for _ in range(rounds):
        middle = (low + high) / 2
        if change(middle) < divergence:
            low = middle
        else:
            high = middle
    return high
