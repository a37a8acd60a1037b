"""Windows of text in which a feature fires, and others: to explain it and to test that.

Contexts are cut into windows of some tokens. Half of the contexts, drawn by lot, are
for explaining, the other half for testing: no explanation is judged on text near that
which it was made from.

Windows that excite a feature are drawn evenly from the tenths of their largest
activations ("deciles"), so that a feature is not judged by its strongest examples
alone; explaining by those ("top") gives descriptions that are too narrow, says the
paper. Windows that do not excite it come from anywhere ("random"), from where one of
its tokens stands ("similar"), or from where features fire whose directions are near
("neighbours"): the latter two tell an exact description from one that only says what
the text is about.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_jax import checks
from sae_jax.evaluation.firings import Firings

Draw = Literal["deciles", "top", "random"]
Others = Literal["random", "similar", "neighbours"]
TENTHS = 10
FREQUENT = 3  # of a feature's tokens, whose windows are similar


class Windows(NamedTuple):
    """Some windows, and what one feature did in them: |f_j|, 0 where it was silent."""

    tokens: Int[np.ndarray, "n L"]
    values: Float[np.ndarray, "n L"]

    @property
    def strongest(self) -> Float[np.ndarray, " n"]:
        """The largest value in each window."""
        return self.values.max(1, initial=0)


class Examples(NamedTuple):
    """What is known of one feature.

    Attributes:
      feature: its number.
      highest: its largest |f_j| anywhere.
      shown: windows in which it fires, for an explainer.
      shown_off: windows in which it does not, for an explainer.
      on: other windows in which it fires, to test on.
      off: other windows in which it does not, to test on.
    """

    feature: int
    highest: float
    shown: Windows
    shown_off: Windows
    on: Windows
    off: Windows


class Sampler:
    """Draws examples of features; the same for the same `seed` and feature.

    Args:
      firings: what all features did.
      length: tokens in a window; contexts are cut into as many as fit.
      seed: decides which contexts are for testing, and which windows are drawn.
    """

    def __init__(self, firings: Firings, *, length: int = 32, seed: int = 0):
        n_contexts, context = firings.tokens.shape
        faults = []
        if not 0 < length <= context:
            faults.append(f"length={length} must be from 1 to the context, {context}.")
        if n_contexts < 2:
            faults.append(
                f"{n_contexts} context: one half explains, the other tests; give more."
            )
        checks.raise_all(faults)
        self.firings, self.length, self.seed = firings, length, seed
        per_context = context // length
        cut = per_context * length
        shape = (n_contexts * per_context, length)
        self._tokens = firings.tokens[:, :cut].reshape(shape)
        used = firings.use[:, :cut].reshape(shape).any(1)
        order = np.random.default_rng(seed).permutation(n_contexts)
        testing = np.zeros(n_contexts, bool)
        testing[order[: n_contexts // 2]] = True
        testing = np.repeat(testing, per_context)
        self.testing = np.flatnonzero(testing & used)
        self.explaining = np.flatnonzero(~testing & used)

    def places(
        self, feature: int
    ) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Float[np.ndarray, " E"]]:
        """The window, the place in it, and |f_j| of each firing of a feature.

        What fires behind the last whole window of a context is left out.
        """
        rows, values = self.firings.of(feature)
        context, place = np.divmod(rows, self.firings.tokens.shape[1])
        per_context = self.firings.tokens.shape[1] // self.length
        inside = place < per_context * self.length
        window = context * per_context + place // self.length
        sizes = np.abs(values).astype(np.float64)
        return window[inside], (place % self.length)[inside], sizes[inside]

    def __call__(
        self,
        feature: int,
        *,
        n_shown: int = 40,
        n_tested: int = 50,
        draw: Draw = "deciles",
        others: Others = "random",
        near: Sequence[int] = (),
    ) -> Examples:
        """Examples of a feature, as many as there are but no more than asked for.

        `near` are the features whose windows are "neighbours". Half of the text may
        have none: a feature that fires seldom gets few examples, or none.
        """
        rng = np.random.default_rng((self.seed, feature))
        window, place, sizes = self.places(feature)
        highest = np.zeros(len(self._tokens))
        np.maximum.at(highest, window, sizes)
        fit = self._fit(others, near, self._tokens[window, place])

        def drawn(part: np.ndarray, n: int, how: Draw) -> tuple[Windows, Windows]:
            on = part[highest[part] > 0]
            off = part[(highest[part] == 0) & fit[part]]
            on = on[choose(highest[on], n, how, rng)]
            off = np.sort(rng.choice(off, min(n, len(off)), replace=False))
            return values_of(on), values_of(off)

        def values_of(chosen: np.ndarray) -> Windows:
            where = np.full(len(self._tokens), -1)
            where[chosen] = np.arange(len(chosen))
            kept = where[window] >= 0
            values = np.zeros((len(chosen), self.length))
            values[where[window[kept]], place[kept]] = sizes[kept]
            return Windows(self._tokens[chosen], values)

        return Examples(
            feature,
            float(highest.max(initial=0)),
            *drawn(self.explaining, n_shown, draw),
            *drawn(self.testing, n_tested, "deciles"),
        )

    def _fit(
        self, others: Others, near: Sequence[int], fired: Int[np.ndarray, " E"]
    ) -> Bool[np.ndarray, " windows"]:
        """Which windows may be taken as others; `fired` are the feature's tokens."""
        if others == "similar":
            found, n = np.unique(fired, return_counts=True)
            frequent = found[np.argsort(-n)[:FREQUENT]]
            return np.asarray(np.isin(self._tokens, frequent).any(1))
        fit = np.full(len(self._tokens), others == "random")
        for other in near if others == "neighbours" else ():
            fit[self.places(other)[0]] = True
        return fit


def choose(
    strongest: Float[np.ndarray, " n"],
    n: int,
    how: Draw,
    rng: np.random.Generator,
) -> Int[np.ndarray, " chosen"]:
    """Which windows to take, by the largest activation in each.

    "deciles": n / 10 from each tenth of the ranks; where a tenth has fewer, all of it.
    """
    if how == "random":
        return np.sort(rng.choice(len(strongest), min(n, len(strongest)), False))
    ranked = np.argsort(-strongest, kind="stable")
    if how == "top":
        return ranked[:n]
    tenths = np.array_split(ranked, TENTHS)
    shares = [len(part) for part in np.array_split(np.arange(n), TENTHS)]
    return np.concatenate(
        [
            rng.choice(tenth, min(share, len(tenth)), replace=False)
            for tenth, share in zip(tenths, shares, strict=True)
        ]
    )


def marked(windows: Windows, threshold: float) -> Bool[np.ndarray, "n L"]:
    """The tokens on which the feature is at least `threshold`, and fires."""
    return (windows.values >= threshold) & (windows.values > 0)
