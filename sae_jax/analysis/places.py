"""Rows of a language model at named positions of prompts: read, and put back changed.

    place = Place.parse("head_out.9/6@end")
    rows = read(lm, prompts, [place])[place]                 # [N, D]
    found = predictions(lm, prompts, {place: rows + shift})  # the model patched there

A place is a site at a position, and of `head_out` perhaps one head. All places that are
given are patched together, in each prompt with the row of its own; what the model makes
of it is looked at after the last token.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax.analysis.prompts import END, Prompts
from sae_jax.checks import unknown
from sae_jax.lm.edits import Edit, apply
from sae_jax.lm.source import Source

PER_PASS = 64
STEP = 8  # lengths are multiples of it


class Place(NamedTuple):
    """Where rows stand: a site, the name of a position, and perhaps a head."""

    site: str
    position: str = END
    head: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Place":
        """From `site@position` or `site/head@position`; without `@` it is the end."""
        where, _, position = text.partition("@")
        site, slash, head = where.partition("/")
        if not site or (slash and not (head.isdigit() and site.startswith("head_out"))):
            raise ValueError(
                f"place={text!r} is neither 'site@position' nor 'head_out.L/head@"
                f"position', such as 'resid_post.2@end'."
            )
        return cls(site, position or END, int(head) if slash else None)

    def __str__(self) -> str:
        head = "" if self.head is None else f"/{self.head}"
        return f"{self.site}{head}@{self.position}"

    def columns(self, lm: Source, width: int) -> slice:
        """Which columns of the site, of this width, are meant."""
        if self.head is None:
            return slice(None)
        n = lm.config.num_attention_heads
        if self.head >= n:
            raise ValueError(f"place={self!s}: {lm.name!r} has {n} heads, from 0 on.")
        each = width // n
        return slice(self.head * each, (self.head + 1) * each)

    def at(self, prompts: Prompts) -> Int[np.ndarray, " N"]:
        """Its position in each prompt."""
        if self.position not in prompts.positions:
            raise ValueError(unknown("position", self.position, prompts.positions))
        found = prompts.positions[self.position]
        if (found < 0).any():
            missing = prompts.texts[int(np.argmax(found < 0))]
            raise ValueError(f"place={self!s}: no {self.position} in {missing!r}.")
        return found


class Predicted(NamedTuple):
    """What the model says after each prompt.

    Attributes:
      token: the likeliest of all.
      among: the likeliest of the answers that the prompts have.
      difference: the logit of the answer less that of the wrong one.
    """

    token: Int[np.ndarray, " N"]
    among: Int[np.ndarray, " N"]
    difference: Float[np.ndarray, " N"]


Rows = dict[Place, Float[np.ndarray, "N D"]]


def read(
    lm: Source, prompts: Prompts, places: Sequence[Place], *, per_pass: int = PER_PASS
) -> Rows:
    """The rows of all prompts at each place."""
    at = {place: place.at(prompts) for place in places}
    found: dict[Place, list[np.ndarray]] = {place: [] for place in places}
    sites = tuple(dict.fromkeys(place.site for place in places))
    for part, tokens in _passes(lm, prompts, per_pass):
        values = lm.run(tokens, read=sites).values
        for place in places:
            value, where = values[place.site], at[place][part]
            row = value[jnp.arange(len(where)), where]
            columns = place.columns(lm, row.shape[1])
            found[place].append(np.asarray(row, np.float32)[:, columns])
    return {place: np.concatenate(rows) for place, rows in found.items()}


def predictions(
    lm: Source,
    prompts: Prompts,
    rows: Mapping[Place, Float[np.ndarray, "N D"]] | None = None,
    *,
    per_pass: int = PER_PASS,
) -> Predicted:
    """What the model predicts, as it is or with these rows in place of its own."""
    candidates = jnp.asarray(np.unique([prompts.answer, prompts.wrong]))
    found: list[tuple[np.ndarray, ...]] = []
    for part, tokens in _passes(lm, prompts, per_pass):
        write = _edits(lm, prompts, rows or {}, part, tokens.shape)
        logits = lm.run(tokens, write=write, logits=True).logits
        n = len(prompts.answer[part])
        pad = (0, len(tokens) - n)  # so that it is compiled once
        at, answer, wrong = (
            np.pad(a[part], pad)
            for a in (prompts.positions[END], prompts.answer, prompts.wrong)
        )
        said = _said(logits, at, answer, wrong, candidates)
        found.append(tuple(np.asarray(one)[:n] for one in said))
    return Predicted(*map(np.concatenate, zip(*found, strict=True)))


def _passes(
    lm: Source, prompts: Prompts, per_pass: int
) -> Iterator[tuple[slice, Int[np.ndarray, "B T"]]]:
    """The prompts of each pass, and their tokens, filled up to one number.

    On the right they are filled up as well, where no earlier position sees it: sets of
    prompts of nearly one length are then read by one compiled program.
    """
    length = prompts.tokens.shape[1]
    longer = max(0, min(-length % STEP, lm.context - length))
    for start in range(0, len(prompts.texts), per_pass):
        part = slice(start, start + per_pass)
        tokens = prompts.tokens[part]
        yield part, np.pad(tokens, ((0, per_pass - len(tokens)), (0, longer)))


def _edits(
    lm: Source,
    prompts: Prompts,
    rows: Mapping[Place, Float[np.ndarray, "N D"]],
    part: slice,
    shape: tuple[int, ...],
) -> dict[str, Edit]:
    """One edit for each site; several places of one site are written by one."""
    new: dict[str, Float[np.ndarray, "B T D"]] = {}
    where: dict[str, Bool[np.ndarray, "B T D"]] = {}
    for place, given in rows.items():
        n_heads = 1 if place.head is None else lm.config.num_attention_heads
        width = given.shape[1] * n_heads
        value = new.setdefault(place.site, np.zeros((*shape, width), np.float32))
        mask = where.setdefault(place.site, np.zeros(value.shape, bool))
        at, columns = place.at(prompts)[part], place.columns(lm, width)
        value[np.arange(len(at)), at, columns] = given[part]
        mask[np.arange(len(at)), at, columns] = True
    return {
        site: apply(_written, jnp.asarray(value), jnp.asarray(where[site]))
        for site, value in new.items()
    }


def _written(old: Array, new: Array, where: Array) -> Array:
    return jnp.where(where, new, old)


@jax.jit
def _said(
    logits: Any, at: Any, answer: Any, wrong: Any, candidates: Any
) -> tuple[Array, Array, Array]:
    rows = jnp.arange(len(at))
    last = logits[rows, at].astype(jnp.float32)
    among = candidates[last[:, candidates].argmax(1)]
    return last.argmax(1), among, last[rows, answer] - last[rows, wrong]
