"""Explanations without a model: the tokens that a feature fires on, or after.

Of each feature, all firings in the half of the text that explains are held against
three kinds of rules:

    on     the token itself is one of a few
    after  the token before is one of a few
    pair   the two tokens, the one before and this one, are one of a few pairs

A rule of one kind is a set of keys. Keys are disjoint, so of all sets of n keys the one
with the most precise keys is the best, and the best set of a kind is found by going
down the list of keys by precision. What is maximised is F1 of "fires here" over
positions. A precision is the lower end of its confidence interval (Wilson's, of two
standard errors): most keys are seen a few times, and of thousands some fit by luck.

The kind of the largest F1 becomes the label, which says F1 as well: a feature that no
such rule describes has a low one, and its label should not be believed.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_jax.analysis.interpretation.windows import Examples, Sampler

Kind = Literal["on", "after", "pair"]
KINDS: tuple[Kind, ...] = ("on", "after", "pair")
MOST_KEYS = 20
ERRORS = 2.0  # standard errors
SHOWN = 5  # keys in the words of a label


class TokenRule(NamedTuple):
    """A set of keys, the most precise first.

    Attributes:
      kind: what a key is compared with.
      keys: the token before and the token itself; -1 for the one that plays no part.
      precision: of each key, the share of its occurrences on which the feature fires,
        as far as it is proved.
      f1: of the whole rule, with these precisions.
    """

    kind: Kind
    keys: Int[np.ndarray, "n 2"]
    precision: Float[np.ndarray, " n"]
    f1: float

    def predict(self, tokens: Int[np.ndarray, "n L"]) -> Float[np.ndarray, "n L"]:
        """At each token the precision of the key that matches, or 0.

        What stands before the first token of a window is not known.
        """
        before = np.concatenate([np.full_like(tokens[:, :1], -1), tokens[:, :-1]], 1)
        first, second = self.keys.T
        hit = (first < 0) | (before[..., None] == first)
        hit &= (second < 0) | (tokens[..., None] == second)
        return np.where(hit, self.precision, 0.0).max(2, initial=0.0)


class Explanation(NamedTuple):
    """Words, and the rule behind them if there is one."""

    text: str
    rule: TokenRule | None = None


class TokenRules:
    """An explainer: `rules(examples)` is the explanation of their feature.

    It looks at all firings of the sampler's explaining half, not at the windows shown.
    `token_texts` are the vocabulary for reading.
    """

    def __init__(self, sampler: Sampler, token_texts: Sequence[str]):
        self.sampler, self.token_texts = sampler, token_texts
        firings = sampler.firings
        length = firings.tokens.shape[1]
        self._n_tokens = int(firings.tokens.max()) + 1
        explains = np.zeros((len(firings.tokens), length // sampler.length), bool)
        explains.reshape(-1)[sampler.explaining] = True
        here = np.zeros(firings.tokens.shape, bool)
        cut = explains.shape[1] * sampler.length
        here[:, :cut] = np.repeat(explains, sampler.length, 1)
        self._here = (here & firings.use).reshape(-1)
        before = np.full(firings.tokens.shape, -1, np.int64)
        before[:, 1:] = firings.tokens[:, :-1]
        self._pairs = np.stack([before, firings.tokens], 2).reshape(-1, 2)
        self._known = {
            kind: np.unique(
                self._codes(kind, self._pairs[self._here]), return_counts=True
            )
            for kind in KINDS
        }

    def __call__(self, examples: Examples) -> Explanation:
        """The best rule of the feature, in words."""
        rows, _ = self.sampler.firings.of(examples.feature)
        fired = self._pairs[rows[self._here[rows]]]
        if not len(fired):
            return Explanation("it does not fire on the text that explains")
        rules = [self._best(kind, fired) for kind in KINDS]
        rule = max(rules, key=lambda rule: rule.f1)
        return Explanation(in_words(rule, self.token_texts), rule)

    def _codes(self, kind: Kind, pairs: Int[np.ndarray, "E 2"]) -> np.ndarray:
        """One number for the key of each position; negative where there is none."""
        before, token = pairs[:, 0], pairs[:, 1].astype(np.int64)
        if kind == "on":
            return token
        if kind == "after":
            return before
        return np.where(before < 0, -1, before * self._n_tokens + token)

    def _best(self, kind: Kind, fired: Int[np.ndarray, "E 2"]) -> TokenRule:
        codes, hits = np.unique(self._codes(kind, fired), return_counts=True)
        codes, hits = codes[codes >= 0], hits[codes >= 0]
        known, counts = self._known[kind]
        occurs = counts[np.searchsorted(known, codes)]
        precision = at_least(hits, occurs)
        order = np.lexsort((codes, -hits, -precision))[:MOST_KEYS]
        if not len(order):
            return TokenRule(kind, np.zeros((0, 2), np.int64), np.zeros(0), 0.0)
        said = np.cumsum(occurs[order])
        f1 = 2 * np.cumsum((precision * occurs)[order]) / (said + len(fired))
        n = int(f1.argmax()) + 1
        codes = codes[order[:n]]
        keys = np.full((n, 2), -1, np.int64)
        if kind == "pair":
            keys[:, 0], keys[:, 1] = np.divmod(codes, self._n_tokens)
        else:
            keys[:, 1 if kind == "on" else 0] = codes
        return TokenRule(kind, keys, precision[order[:n]], float(f1[n - 1]))


def at_least(
    hits: Int[np.ndarray, " n"], occurs: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The share that hits prove: the lower end of Wilson's interval."""
    p, z2 = hits / occurs, ERRORS**2 / occurs
    spread = np.sqrt(z2 * p * (1 - p) + z2**2 / 4)
    return (p + z2 / 2 - spread) / (1 + z2)


def in_words(rule: TokenRule, token_texts: Sequence[str]) -> str:
    """A rule as a label: `on "self", "cls" (F1 0.83)`."""

    def quoted(token: int) -> str:
        known = 0 <= token < len(token_texts)
        return f'"{token_texts[token]}"' if known else f"[{token}]"

    def said(before: int, token: int) -> str:
        if rule.kind == "pair":
            return f"{quoted(token)} after {quoted(before)}"
        return quoted(token if rule.kind == "on" else before)

    listed = ", ".join(said(*key) for key in rule.keys[:SHOWN].tolist())
    more = len(rule.keys) - SHOWN
    rest = f" and {more} more" if more > 0 else ""
    word = {"on": "on ", "after": "after ", "pair": "on "}[rule.kind]
    return f"{word}{listed}{rest} (F1 {rule.f1:.2f})"


class RuleJudge:
    """Judges by the rule of an explanation, as far as it goes.

    Probabilities are the precision of the key that matches: of the best one in a
    window, and on average over the marked tokens.
    """

    def detect(
        self, explanation: Explanation, tokens: Int[np.ndarray, "n L"]
    ) -> list[float | None]:
        """How likely the feature fires in each window."""
        return [float(one) for one in self.simulate(explanation, tokens).max(1)]

    def fuzz(
        self,
        explanation: Explanation,
        tokens: Int[np.ndarray, "n L"],
        marks: Bool[np.ndarray, "n L"],
    ) -> list[float | None]:
        """How likely the marked tokens are those that it fires on."""
        expected = self.simulate(explanation, tokens)
        return [
            float(row[on].mean()) if on.any() else None
            for row, on in zip(expected, marks, strict=True)
        ]

    def simulate(
        self, explanation: Explanation, tokens: Int[np.ndarray, "n L"]
    ) -> Float[np.ndarray, "n L"]:
        """How strongly it is expected to fire, up to a factor."""
        if explanation.rule is None:
            return np.zeros(tokens.shape)
        return explanation.rule.predict(tokens)
