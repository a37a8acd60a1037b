"""Erasing a concept: features of its prompts and of no others, a gated edit.

"Interpret then deactivate" (ItD), made for the text encoder of an image model; here for
any site of a language model. By the authors' code, as far as it is known to us:

    features   the n of the highest peak code in a target prompt, over positions 1 on,
               less those that are among the n highest of any retained prompt
    edit       f'_j = factor * f_j for these features, at positions 1 on; factor -8
    response   of a prompt to the edit: the mean of (x' - x)^2 over its positions and
               the width, x the site as it was and x' as it is edited
    gate       a prompt is edited if its response is at least 0.99 times the least of
               the target prompts; else nothing of it changes, to the last bit

So the response is also a classifier that was never trained, `auroc`, with
`auroc_by_chance` beside it, that of shuffled labels.

Differs: the SAE's error is kept, x' = x + decode(f') - decode(f). The code decodes f'
alone, which changes every prompt by the SAE's error, so that a response is never 0. One
statistic, the mean over positions, sets the threshold and opens the gate; the code sets
it by the largest token and compares the mean with it. Several target prompts: the
features of each are taken together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from sae_jax.analysis.interpretation.scores import auroc
from sae_jax.evaluation import steering
from sae_jax.evaluation.firings import Firings
from sae_jax.evaluation.heldout import Evaluator, HeldOut
from sae_jax.lm.edits import Edit, apply
from sae_jax.lm.source import Source
from sae_jax.trained import TrainedSAE

FACTOR, MARGIN, STRONGEST = -8.0, 0.99, 128  # the authors'
SHUFFLES = 200


def peaks(firings: Firings) -> Float32[np.ndarray, "N F"]:
    """The highest code of every feature in every prompt; position 0 does not count."""
    features = np.repeat(np.arange(firings.n_features), np.diff(firings.starts))
    prompts, positions = np.divmod(firings.rows, firings.tokens.shape[1])
    late = positions > 0
    found = np.zeros((len(firings.tokens), firings.n_features), np.float32)
    np.maximum.at(found, (prompts[late], features[late]), firings.values[late])
    return found


def strongest(
    peak: Float[np.ndarray, "N F"], n: int = STRONGEST
) -> Bool[np.ndarray, "N F"]:
    """The n features of the highest peaks of each prompt, of those above 0."""
    n = min(n, peak.shape[1])
    chosen = np.zeros(peak.shape, bool)
    np.put_along_axis(chosen, np.argpartition(-peak, n - 1, 1)[:, :n], True, 1)
    return chosen & (peak > 0)


def contrast(
    target: Float[np.ndarray, "P F"],
    retained: Float[np.ndarray, "Q F"],
    n: int = STRONGEST,
) -> Int[np.ndarray, " m"]:
    """The features of target prompts and of no retained one, from their peaks.

    Those that are among the strongest of most target prompts come first.
    """
    counts = strongest(target, n).sum(0)
    counts[strongest(retained, n).any(0)] = 0
    found = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if not len(found):
        raise ValueError(
            f"each of the strongest n={n} features of the {len(target)} target prompts "
            f"is one of a retained prompt as well; take fewer retained prompts "
            f"({len(retained)} now), or a smaller n."
        )
    return found


def erase(
    one: TrainedSAE,
    features: Sequence[int] | Int[np.ndarray, " m"],
    use: Bool[Array | np.ndarray, "B T"],
    *,
    factor: float = FACTOR,
    threshold: float = 0.0,
) -> Edit:
    """Multiplies features, in prompts whose response is at least the threshold.

    `use` are the positions that count, of which position 0 is none.
    """
    late = jnp.asarray(use).at[:, 0].set(False)
    edit = steering.scale(one, features, factor, where=late)
    return apply(_gated, edit, late, jnp.asarray(threshold, jnp.float32))


def _gated(old: Array, edit: Edit, use: Array, threshold: Array) -> Array:
    new = edit(old)
    is_open = change(old, new, use) >= threshold
    return jnp.where(is_open[:, None, None], new, old)


def change(
    old: Float[Array, "B T D"], new: Float[Array, "B T D"], use: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """The response of each prompt; 0 of one without any position that counts."""
    squares = jnp.square(new.astype(jnp.float32) - old.astype(jnp.float32)).mean(-1)
    total = jnp.where(use, squares, 0).sum(1)
    return total / jnp.maximum(use.sum(1), 1)


class Effect(NamedTuple):
    """What erasing does to prompts.

    Attributes:
      responses: of each prompt, to the edit without a gate.
      scores: `loss_clean`; loss and divergence from the clean model with every prompt
        edited, `loss_erased` and `kl_erased`, and with the gate, `_guarded`; `edited`,
        the share of prompts that the gate is open to.
    """

    responses: Float32[np.ndarray, " N"]
    scores: dict[str, float]


def effect(
    lm: Source,
    one: TrainedSAE,
    site: str,
    features: Sequence[int] | Int[np.ndarray, " m"],
    prompts: HeldOut,
    *,
    factor: float = FACTOR,
    threshold: float = 0.0,
    contexts_per_pass: int = 16,
) -> Effect:
    """Erases features from prompts; losses are means over all of their next tokens."""
    found = []

    def make(rows: dict[str, Array], part: HeldOut) -> dict[str, Array]:
        x = rows[site].reshape(*part.tokens.shape, -1)
        edit = erase(one, features, part.use, factor=factor)
        erased, response = _erased(x, edit, part.use)
        found.append(np.asarray(response))
        is_open = response >= threshold
        return {
            "erased": erased,
            "guarded": jnp.where(is_open[:, None, None], erased, x),
        }

    evaluator = Evaluator(lm, prompts, contexts_per_pass=contexts_per_pass)
    scores = evaluator.splice(site, make)
    response = np.concatenate(found)[: len(prompts.tokens)]
    return Effect(response, {**scores, "edited": float((response >= threshold).mean())})


@jax.jit
def _erased(x: Array, edit: Edit, use: Array) -> tuple[Array, Array]:
    new = edit(x)
    return new, change(x, new, use.at[:, 0].set(False))


def threshold_of(target: Float[np.ndarray, " P"], *, margin: float = MARGIN) -> float:
    """The threshold from the responses of the target prompts."""
    if not (least := float(target.min())) > 0:
        raise ValueError(
            f"{int((target == 0).sum())} of the {len(target)} target prompts do not "
            f"respond to the edit, so that a gate would be open to all; leave them "
            f"out, or choose more features by a larger n."
        )
    return margin * least


def auroc_by_chance(
    right: Float[np.ndarray, " n"], wrong: Float[np.ndarray, " m"], *, seed: int = 0
) -> Float[np.ndarray, " s"]:
    """The areas under the ROC curve of the same responses under shuffled labels."""
    rng, both = np.random.default_rng(seed), np.concatenate([right, wrong])
    n = len(right)
    shuffles = (rng.permutation(both) for _ in range(SHUFFLES))
    return np.array([auroc(one[:n], one[n:]) for one in shuffles])
