"""Text about a concept and other text, by identifiers; not an experiment."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from sae_jax.analysis import erasure
from sae_jax.analysis.interpretation.scores import auroc
from sae_jax.evaluation import HeldOut
from sae_jax.lm.source import Source
from sae_jax.text.contexts import Packing, contexts
from sae_jax.text.documents import Documents
from sae_jax.trained import TrainedSAE


class Texts(NamedTuple):
    """Contexts with at least so many of the words, and contexts with none of them."""

    concept: HeldOut
    other: HeldOut


def split(
    documents: Documents,
    tokenizer: Any,
    packing: Packing,
    n_contexts: int,
    words: Sequence[str],
    least: int,
) -> Texts:
    """Looks through the first contexts of a text; those in between are in neither."""
    once = contexts(documents, tokenizer, packing._replace(repeat=False))
    found = [c for c in islice(once, n_contexts) if c.use.any()]
    counts = np.array([len(told(words).findall(t)) for t in texts_of(found, tokenizer)])
    whole = HeldOut(*(np.stack(a) for a in zip(*((c[:3]) for c in found), strict=True)))
    return Texts(taken(whole, counts >= least), taken(whole, counts == 0))


def told(words: Sequence[str]) -> re.Pattern[str]:
    """Finds the words, also as parts of `names_with_underscores`."""
    either = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{either})(?![A-Za-z0-9])")


def texts_of(found: Sequence[Any], tokenizer: Any) -> list[str]:
    """The text of contexts, without what stands before and behind it."""
    ids = [c.tokens[c.real].tolist() for c in found]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def drawn(prompts: HeldOut, n: int, rng: np.random.Generator) -> HeldOut:
    """Some of them by lot, or all if they are fewer."""
    lot = rng.permutation(len(prompts.tokens))[:n]
    return taken(prompts, np.sort(lot))


def taken(prompts: HeldOut, which: np.ndarray) -> HeldOut:
    """These of the contexts."""
    return HeldOut(*(array[which] for array in prompts))


def renamed(
    prompts: HeldOut, tokenizer: Any, words: Sequence[str], by: Sequence[str]
) -> HeldOut:
    """The same text with each of the words replaced, as far as contexts are long."""
    names = dict(zip(words, by, strict=True))
    length = prompts.tokens.shape[1]
    tokens, real = prompts.tokens.copy(), np.zeros_like(prompts.real)
    rows = [HeldOut(*row) for row in zip(*prompts, strict=True)]
    for i, text in enumerate(texts_of(rows, tokenizer)):
        text = told(words).sub(lambda found: names[found[0]], text)
        new = tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1]
        tokens[i, 1 : 1 + len(new)] = new
        real[i, : 1 + len(new)] = True
    use = real & (np.arange(length) > 0)
    return HeldOut(np.where(real, tokens, prompts.tokens[:, :1]), real, use)


def tried(
    one: TrainedSAE,
    lm: Source,
    site: str,
    features: np.ndarray,
    target: HeldOut,
    kinds: Mapping[str, HeldOut],
    *,
    factor: float,
    margin: float,
    contexts_per_pass: int,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Erases features from texts of several kinds; scores and responses by kind.

    The threshold is that of the target prompts. The kind "other" is what the first is
    to be told from.
    """
    of = partial(
        erasure.effect, lm, one, site, features, contexts_per_pass=contexts_per_pass
    )
    threshold = erasure.threshold_of(of(target, factor=factor).responses, margin=margin)
    scores = {"features": float(len(features)), "threshold": threshold}
    responses = {}
    for kind, prompts in kinds.items():
        found = of(prompts, factor=factor, threshold=threshold)
        responses[kind] = found.responses
        scores[f"{kind}_contexts"] = float(len(prompts.tokens))
        scores |= {f"{kind}_{name}": value for name, value in found.scores.items()}
    for kind in [kind for kind in kinds if kind != "other"]:
        pair = responses[kind], responses["other"]
        chance = erasure.auroc_by_chance(*pair)
        scores[f"{kind}_auroc"] = auroc(*pair)
        scores[f"{kind}_auroc_by_chance"] = float(chance.mean())
        scores[f"{kind}_auroc_by_chance_95"] = float(np.quantile(chance, 0.95))
    return scores, responses
