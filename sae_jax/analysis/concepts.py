"""What a feature of any kind stands for, and whether writing it brings that about.

For features that are given by their activations and by a direction, of an SAE or not,
and without anybody who judges. The concept of a feature is a set of tokens: those most
over-represented where it is most active (what it fires on), or right after (what comes
next). Of a token that is there `hits` times of `n`, and has the share p of the text,
the weight is `hits log(hits / n / p)`, its part of a divergence.

    detection   S_CD = log(mean of the largest activation in windows with the concept
                           / the same in windows without)

Steering adds a direction at all positions of a text, and looks at the predictions p'
there, beside those of the clean model, p:

    concept     (share - share_0) / (1 - share_0) or 0 if that is less; share = the
                mean of p'(concept), share_0 that of p
    fluency     exp(-(loss - loss_0)) or 1 if that is more; loss = the mean of
                sum_v p'_v (-log p_v), the clean model's loss on what would be written
                next, loss_0 with p for p'
    both        their harmonic mean

S_CD and a harmonic mean of concept and fluency are those of Shafran et al. 2025,
arXiv:2506.10920. Differs: there a large model writes concepts and sentences and judges
whole texts. What is measured here is ours: one token ahead, by expectation, so that
nothing is drawn; its numbers are not comparable with theirs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax.lm.edits import add, replace
from sae_jax.lm.source import Source

N_STRONGEST, N_TOKENS = 50, 10  # activations looked at, tokens of a concept; chosen
LEAST = 2  # hits; a token seen once is chance


def through(
    lm: Source, rows: Float[np.ndarray, "K N"], source: str, target: str
) -> Float[np.ndarray, "K D"]:
    """What rows at one site add at another, where the way between is linear.

    So it is from `mlp_hidden` to `mlp_out`, by the output matrix, and from `head_out`
    to `attn_out`. Each position of a pass holds another row, the first of them none.
    """
    n, width = rows.shape
    length = min(n + 1, lm.context)
    n_passes = -(-n // (length - 1))
    held = np.zeros((n_passes, length, width), np.float32)
    padded = np.pad(rows, ((0, n_passes * (length - 1) - n), (0, 0)))
    held[:, 1:] = padded.reshape(n_passes, length - 1, width)
    tokens = np.zeros((n_passes, length), np.int32)
    edit = replace(jnp.asarray(held))
    out = np.asarray(
        lm.run(tokens, read=(target,), write={source: edit}).values[target]
    )
    moved = (out[:, 1:] - out[:, :1]).reshape(-1, out.shape[-1])
    return np.asarray(moved[:n], np.float32)


def concept(
    strength: Float[np.ndarray, "N T"],
    tokens: Int[np.ndarray, "N T"],
    use: Bool[np.ndarray, "N T"],
    *,
    ahead: int = 0,
) -> Int[np.ndarray, " n"]:
    """The tokens that a feature stands for, weightiest first; none if it is silent.

    `strength` are its activations, `use` the positions that count; 1 `ahead` are the
    tokens that come next.
    """
    flat = np.where(use, strength, 0).reshape(-1)
    top = np.argsort(-flat, kind="stable")[:N_STRONGEST]
    row, at = np.divmod(top[flat[top] > 0], tokens.shape[1])
    inside = at + ahead < tokens.shape[1]
    row, at = row[inside], at[inside] + ahead
    ids, hits = np.unique(tokens[row, at][use[row, at]], return_counts=True)
    if not len(ids):
        return np.zeros(0, np.int64)
    base = np.bincount(tokens[use], minlength=int(tokens.max()) + 1) / use.sum()
    weight = hits * np.log(hits / hits.sum() / base[ids])
    order = np.argsort(-weight, kind="stable")
    order = order[(hits[order] >= LEAST) & (weight[order] > 0)]
    return ids[order[:N_TOKENS]].astype(np.int64)


def detection(
    strength: Float[np.ndarray, "N T"],
    tokens: Int[np.ndarray, "N T"],
    words: Int[np.ndarray, " n"],
    *,
    length: int = 32,
) -> float:
    """S_CD of a feature with a concept; NaN where one kind of window is missing."""
    shape = (-1, length)
    cut = tokens.shape[1] // length * length
    highest = strength[:, :cut].reshape(shape).max(1)
    has = np.isin(tokens[:, :cut], words).reshape(shape).any(1)
    return s_cd(highest[has], highest[~has])


def s_cd(concept: Float[np.ndarray, " n"], neutral: Float[np.ndarray, " m"]) -> float:
    """Of the largest activations in sentences; infinite where all neutral are 0."""
    if not len(concept) or not len(neutral):
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.log(np.mean(concept)) - np.log(np.mean(neutral)))


class Steered(NamedTuple):
    """The mean prediction, and the clean model's mean loss on what it predicts."""

    prediction: Float[np.ndarray, " V"]
    loss: float

    def share(self, words: Int[np.ndarray, " n"]) -> float:
        """How much of the prediction is of a concept."""
        return float(self.prediction[words].sum(dtype=np.float64))


class Success(NamedTuple):
    """How well steering worked, each from 0 to 1."""

    concept: float
    fluency: float

    @property
    def both(self) -> float:
        """The harmonic mean."""
        total = self.concept + self.fluency
        return 2 * self.concept * self.fluency / total if total > 0 else 0.0


class Steering:
    """Adds directions at a site, everywhere in a text, and looks at the predictions."""

    def __init__(self, lm: Source, site: str, tokens: Int[np.ndarray, "N T"]):
        self.lm, self.site, self.tokens = lm, site, tokens
        self._clean = lm.run(tokens, logits=True).logits
        self.plain = self(np.zeros(lm.width(site)), 0.0)

    def __call__(self, direction: Float[np.ndarray, " D"], amount: float) -> Steered:
        """With `amount` times the direction, at length 1."""
        length = np.linalg.norm(direction)
        unit = direction / length if length > 0 else direction
        edit = add(jnp.asarray(amount * unit, jnp.float32))
        run = self.lm.run(self.tokens, write={self.site: edit}, logits=True)
        prediction, loss = _expected(self._clean, run.logits)
        return Steered(np.asarray(prediction), float(loss))

    def success(self, steered: Steered, words: Int[np.ndarray, " n"]) -> Success:
        """How far the concept is predicted, and what the clean model says of it."""
        before, after = self.plain.share(words), steered.share(words)
        gain = max(0.0, after - before) / (1 - before) if before < 1 else 0.0
        return Success(gain, math.exp(-max(0.0, steered.loss - self.plain.loss)))


@jax.jit
def _expected(
    clean: Float[Array, "N T V"], changed: Float[Array, "N T V"]
) -> tuple[Float[Array, " V"], Float[Array, ""]]:
    log_p, log_q = (
        jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (clean, changed)
    )
    q = jnp.exp(log_q)
    return q.mean((0, 1)), -(q * log_p).sum(2).mean()


def of_others(n: int, *, seed: int = 0) -> Int[np.ndarray, " n"]:
    """For each of n features another one, in one circle: the shuffled baseline."""
    order = np.random.default_rng(seed).permutation(n)
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return other


def mean_length(rows: Float[np.ndarray, "n D"]) -> float:
    """The mean norm of rows, the unit in which directions are added."""
    return float(np.linalg.norm(rows.astype(np.float64), axis=1).mean())
