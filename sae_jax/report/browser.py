"""The feature browser's data: what a catalogue of features holds, packed for a page.

Numbers of the list come in one chunk, as do the places of the texts that a search looks
through. Details come in chunks of 128 features, which the page unpacks when they are
asked for. Examples are rows of contexts that the page holds once.

What is packed is for looking at: an activation is kept as one of 255 levels of its
feature's highest, without its sign; other numbers are float32.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped

from sae_jax import checks
from sae_jax.analysis.interpretation.labels import Labels
from sae_jax.evaluation.catalogue import Catalogue
from sae_jax.evaluation.firings import Firings
from sae_jax.report.browser_chunks import Texts, chunk, narrow
from sae_jax.report.figures import BANDS, MOST_POINTS, norm_limit

FEATURES = 128  # in a chunk of details
LEVELS = 255

# Samples by name of the SAE and feature, each a label and a text.
Steered: TypeAlias = Mapping[str, Mapping[int, Sequence[tuple[str, str]]]]


@dataclass(frozen=True)
class Browser:
    """The features of one SAE.

    Attributes:
      catalogue: what is known of each.
      token_texts: the text of each token, for reading; see `token_texts`.
      labels: what each feature stands for, if that is known.
    """

    catalogue: Catalogue
    token_texts: Sequence[str]
    labels: Labels | None = None


@dataclass(frozen=True)
class Points:
    """The rows of one panel of the interactive ZF plot.

    Attributes:
      norm_z: norm of each row, NaN where it does not count.
      norm_f: norm of its code.
      tokens: contexts whose positions are the rows, if their text is to be shown.
      token_texts: the text of each token.
    """

    norm_z: Float[np.ndarray, " R"]
    norm_f: Float[np.ndarray, " R"]
    tokens: Int[np.ndarray, "N T"] | None = None
    token_texts: Sequence[str] = ()


def packed(
    browsers: Mapping[str, Browser],
    zf: Mapping[str, Points],
) -> Iterator[str]:
    """The elements that hold all that the script of a page shows."""
    checks.raise_all(_faults(browsers, zf))
    texts = Texts()
    about: dict[str, Any] = {"browsers": [], "zf": []}
    for number, (name, browser) in enumerate(browsers.items()):
        catalogue, firings = browser.catalogue, browser.catalogue.firings
        about["browsers"].append(
            {
                "name": name,
                "n_features": firings.n_features,
                "per_chunk": FEATURES,
                "groups": catalogue.groups,
                "contexts": texts.contexts(firings.tokens, browser.token_texts),
            }
        )
        yield _columns(f"columns{number}", browser, texts)
        yield from _details(f"details{number}", browser, texts)
    for number, (name, points) in enumerate(zf.items()):
        more, data = _points(f"points{number}", points, texts)
        about["zf"].append({"name": name, **more})
        yield data
    yield from texts.chunks()
    # "<" is written so that no text can end the element.
    written = json.dumps(about, ensure_ascii=False).replace("<", "\\u003c")
    yield f'<script type="application/json" id="about">{written}</script>'


def _faults(browsers: Mapping[str, Browser], zf: Mapping[str, Points]) -> Iterator[str]:
    for name, browser in browsers.items():
        n_examples = browser.catalogue.examples.shape[1]
        grouped = sum(n for _, n in browser.catalogue.groups)
        if grouped != n_examples:
            yield (
                f"browsers[{name!r}]: the groups name {grouped} examples a feature, "
                f"the catalogue has {n_examples}; give a group to each."
            )
    for name, points in zf.items():
        if points.tokens is not None and points.tokens.size != len(points.norm_z):
            yield (
                f"zf[{name!r}]: {points.tokens.size} tokens and {len(points.norm_z)} "
                f"norms; give one norm for each position, NaN where it does not count."
            )


def _columns(name: str, browser: Browser, texts: Texts) -> str:
    """What the list shows, sorts and searches, of all features."""
    c = browser.catalogue
    at_examples = np.where(
        c.examples >= 0, c.firings.tokens.reshape(-1)[c.examples], -1
    )
    strongest = at_examples[:, : c.groups[0][1]]
    raised = strongest[:, :0] if c.raised is None else c.raised
    labels: dict[str, np.ndarray] = {}
    if browser.labels is not None:
        labels = {
            "label": texts.words(browser.labels.text),
            "detection": browser.labels.detection.astype(np.float32),
            "fuzzing": browser.labels.fuzzing.astype(np.float32),
        }
    return chunk(
        name,
        **labels,
        density=c.density.astype(np.float32),
        strength=c.strength.astype(np.float32),
        norm_ratio=c.norm_ratio.astype(np.float32),
        highest=c.highest.astype(np.float32),
        strongest=texts.places(strongest, browser.token_texts),
        raised=texts.places(raised, browser.token_texts),
    )


def _details(name: str, browser: Browser, texts: Texts) -> Iterator[str]:
    """What is shown of one feature, some features together."""
    c = browser.catalogue
    logits: dict[str, np.ndarray] = {}
    if c.raised is not None and c.lowered is not None:
        logits = {
            "raised": texts.places(c.raised, browser.token_texts),
            "raised_by": np.asarray(c.raised_by, np.float32),
            "lowered": texts.places(c.lowered, browser.token_texts),
            "lowered_by": np.asarray(c.lowered_by, np.float32),
        }
    for first in range(0, c.firings.n_features, FEATURES):
        part = slice(first, first + FEATURES)
        yield chunk(
            f"{name}-{first // FEATURES}",
            histogram=narrow(c.histogram[part]),
            examples=c.examples[part],
            nearest=c.nearest[part],
            nearest_cosine=c.nearest_cosine[part].astype(np.float32),
            **{key: array[part] for key, array in logits.items()},
            **_windows(c.firings, c.examples[part], c.highest, first),
        )


def _windows(
    firings: Firings,
    examples: Int[np.ndarray, "n E"],
    highest: Float[np.ndarray, " F"],
    first: int,
) -> dict[str, Shaped[np.ndarray, " _"]]:
    """Where and how strongly features `first` onwards fired around their examples.

    `counts` says how many firings the context of each example has; `positions` and
    `levels` are those of all examples, one after another.
    """
    n_rows, width = firings.tokens.size, firings.tokens.shape[1]
    starts = firings.starts[first : first + len(examples) + 1]
    rows = firings.rows[starts[0] : starts[-1]].astype(np.int64)
    owner = np.repeat(np.arange(len(examples)), np.diff(starts))
    # Ascending, since rows ascend within a feature: two searches find a context.
    keys = owner * n_rows + rows
    begin = np.arange(len(examples))[:, None] * n_rows + examples // width * width
    low = np.searchsorted(keys, begin).reshape(-1)
    high = np.searchsorted(keys, begin + width).reshape(-1)
    counts = np.where(examples.reshape(-1) >= 0, high - low, 0)
    before = np.cumsum(counts) - counts
    taken = np.repeat(low - before, counts) + np.arange(counts.sum())
    values = firings.values[starts[0] : starts[-1]][taken]
    levels = np.rint(LEVELS * np.abs(values) / highest[first + owner[taken]])
    return {
        "counts": narrow(counts),
        "positions": narrow(rows[taken] % width),
        "levels": np.clip(levels, 1, LEVELS).astype(np.uint8),
    }


def _points(name: str, points: Points, texts: Texts) -> tuple[dict[str, Any], str]:
    """One panel: rows drawn by lot, and up to where its axes go, as in `zf_figure`."""
    z, f = (norms.astype(np.float32) for norms in (points.norm_z, points.norm_f))
    rows = np.flatnonzero(np.isfinite(z) & np.isfinite(f))
    limit = 1.0
    if len(rows):
        limit = norm_limit(z[rows], f[rows])
    inside = rows[(z[rows] <= limit) & (f[rows] <= limit)]
    lot = np.random.default_rng(0).permutation(inside)[:MOST_POINTS]
    contexts = None
    if points.tokens is not None:
        contexts = texts.contexts(points.tokens, points.token_texts)
    about = {
        "limit": limit,
        "bands": BANDS,
        "n_rows": len(rows),
        "n_outside": len(rows) - len(inside),
        "contexts": contexts,
    }
    lot = lot[np.argsort(z[lot], kind="stable")]  # arrow keys go from left to right
    return about, chunk(name, norm_z=z[lot], norm_f=f[lot], row=narrow(lot))
