"""An explainer and a judge that ask a language model.

Windows are written as text, the tokens that a feature fires on in << >>; strengths as
ceil(10 * value / highest), from 0 to 10. The instructions are this project's own words,
for the tasks that the paper describes.
"""

import json
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_jax.analysis.interpretation.chat import Chat
from sae_jax.analysis.interpretation.scores import THRESHOLD
from sae_jax.analysis.interpretation.token_rules import Explanation
from sae_jax.analysis.interpretation.windows import Examples, marked

LEVELS = 10
AT_ONCE = 5  # windows in one question (the paper; its code asks one by one)
NUMBERS = re.compile(r"\[[\d\s.,]*\]")

EXPLAIN = (
    "A unit of a neural network fires on some tokens of text. You are shown passages; "
    "the tokens on which it fires are between << and >>, and the strengths, from 1 to "
    "10, are listed behind each passage. Say in one short sentence what the marked "
    "tokens have in common: the tokens, what stands before them, or what the passage "
    "is about. Answer with that sentence alone."
)
DETECT = (
    "A unit of a neural network is described like this: {text}\n"
    "Which of the following passages contain something that it fires on? Answer with "
    "a JSON list of {n} numbers, one for each passage in order: 1 if it fires there, 0 "
    "if not, and nothing else."
)
FUZZ = (
    "A unit of a neural network is described like this: {text}\n"
    "In each of the following passages some tokens are between << and >>. Are they "
    "those that the unit fires on? Answer with a JSON list of {n} numbers, one for "
    "each passage in order: 1 if the marks are right, 0 if not, and nothing else."
)
SIMULATE = (
    "A unit of a neural network is described like this: {text}\n"
    "For each of the {n} numbered tokens below, say how strongly it fires on it, from "
    "0 to 10. Answer with a JSON list of {n} numbers and nothing else."
)


def written(
    tokens: Int[np.ndarray, " L"],
    marks: Bool[np.ndarray, " L"],
    token_texts: Sequence[str],
) -> str:
    """A window as text; neighbouring marked tokens stand in one pair of << >>."""
    parts, inside = [], False
    for token, mark in zip(tokens.tolist(), marks.tolist(), strict=True):
        if mark != inside:
            parts.append("<<" if mark else ">>")
            inside = mark
        parts.append(token_texts[token] if token < len(token_texts) else f"[{token}]")
    return "".join(parts) + (">>" if inside else "")


def numbers(answer: str, n: int) -> list[float] | None:
    """The list of n numbers in an answer, or None."""
    for found in reversed(NUMBERS.findall(answer)):
        try:
            values = json.loads(found)
        except ValueError:
            continue
        if len(values) == n:
            return [float(value) for value in values]
    return None


class AskedExplainer:
    """`explain(examples)` is what a model says of the windows that are shown."""

    def __init__(self, chat: Chat, token_texts: Sequence[str]):
        self.chat, self.token_texts = chat, token_texts

    def __call__(self, examples: Examples) -> Explanation:
        """One sentence, the first line of the answer that says something."""
        where = marked(examples.shown, THRESHOLD * examples.highest)
        strengths = examples.shown.values / examples.highest
        lines = []
        for tokens, shares, marks in zip(
            examples.shown.tokens, strengths, where, strict=True
        ):
            text = written(tokens, marks, self.token_texts)
            levels = [
                f"{self.token_texts[t].strip()} {math.ceil(LEVELS * v)}"
                for t, v in zip(tokens[marks], shares[marks], strict=True)
            ]
            lines.append(f"{text}\nStrengths: {', '.join(levels)}")
        asked = [
            {"role": "system", "content": EXPLAIN},
            {"role": "user", "content": "\n\n".join(lines)},
        ]
        said = (line.strip() for line in self.chat(asked).splitlines())
        return Explanation(next(filter(None, said), "no answer"))


class AskedJudge:
    """Judges as a model says that it would; answers that are no list are None."""

    def __init__(self, chat: Chat, token_texts: Sequence[str]):
        self.chat, self.token_texts = chat, token_texts

    def detect(
        self, explanation: Explanation, tokens: Int[np.ndarray, "n L"]
    ) -> list[float | None]:
        """How likely the feature fires in each window."""
        return self._asked(DETECT, explanation, tokens, np.zeros(tokens.shape, bool))

    def fuzz(
        self,
        explanation: Explanation,
        tokens: Int[np.ndarray, "n L"],
        marks: Bool[np.ndarray, "n L"],
    ) -> list[float | None]:
        """How likely the marked tokens are those that it fires on."""
        return self._asked(FUZZ, explanation, tokens, marks)

    def simulate(
        self, explanation: Explanation, tokens: Int[np.ndarray, "n L"]
    ) -> Float[np.ndarray, "n L"]:
        """From 0 to 10 on each token; 0 throughout a window without an answer."""
        found = np.zeros(tokens.shape)
        for row, window in zip(found, tokens.tolist(), strict=True):
            listed = "\n".join(
                f"{i} {self.token_texts[token]}" for i, token in enumerate(window)
            )
            answer = self._ask(SIMULATE, explanation, len(window), listed)
            if (values := numbers(answer, len(window))) is not None:
                row[:] = values
        return found

    def _asked(
        self,
        instruction: str,
        explanation: Explanation,
        tokens: Int[np.ndarray, "n L"],
        marks: Bool[np.ndarray, "n L"],
    ) -> list[float | None]:
        found: list[float | None] = []
        for start in range(0, len(tokens), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            texts = [
                written(*window, self.token_texts)
                for window in zip(tokens[part], marks[part], strict=True)
            ]
            listed = "\n\n".join(f"Passage {i}: {t}" for i, t in enumerate(texts, 1))
            answer = self._ask(instruction, explanation, len(texts), listed)
            found += numbers(answer, len(texts)) or [None] * len(texts)
        return found

    def _ask(
        self, instruction: str, explanation: Explanation, n: int, text: str
    ) -> str:
        system = instruction.format(text=explanation.text, n=n)
        return self.chat(
            [
                {"role": "system", "content": system},
                {"role": "user", "content": text},
            ]
        )
