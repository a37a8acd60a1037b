"""The error of an SAE, averaged within each context and then over contexts.

As FAST (Li et al. 2025, arXiv:2506.07691) scores dialogues, each of them a context, so
that long ones count no more than short ones:

    mse           mean over contexts of the mean over its used tokens of (x - x_hat)^2,
                  which is a mean over the width, in the activations' own units
    mse_special   the same over the tokens with the tokenizer's special ids
    log2_...      of these; the paper's tables hold log2, also where they say MSE

A context without a special token is left out of `mse_special`.

Differs: a mean over the width, as everywhere in this package. Where a paper sums over
it, its log2 is higher by log2 of the width, for all SAEs alike.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sae_jax.evaluation.heldout import HeldOut
from sae_jax.evaluation.measures import ratio
from sae_jax.lm.source import Source
from sae_jax.model import SAE
from sae_jax.variables import Variables


def errors_by_context(
    lm: Source,
    sae: SAE,
    variables: Variables,
    site: str,
    heldout: HeldOut,
    special: Sequence[int],
    *,
    contexts_per_pass: int = 16,
) -> dict[str, float]:
    """The scores of the top of this file, and of how many tokens they are.

    `special` are the ids of special tokens, such as `tokenizer.all_special_ids`.
    """
    if sae.is_transcoder:
        raise ValueError(f"{sae!r} is a transcoder: its error is that of another site.")
    errors = []
    for part in heldout.passes(contexts_per_pass):
        x = lm.run(part.tokens, read=(site,)).values[site]
        rows = x.reshape(-1, x.shape[-1]), part.use.reshape(-1)
        errors.append(np.asarray(_errors(sae, variables, *rows)).reshape(x.shape[:2]))
    found = np.concatenate(errors)[: len(heldout.tokens)].astype(np.float64)
    masks = {"": heldout.use, "_special": special_tokens(heldout, special)}
    scores: dict[str, float] = {}
    for name, mask in masks.items():
        value = mean_by_context(found, mask)
        scores[f"mse{name}"] = value
        scores[f"log2_mse{name}"] = math.log2(value) if value > 0 else math.nan
        scores[f"tokens{name}"] = float(mask.sum())
    return scores


def special_tokens(heldout: HeldOut, special: Sequence[int]) -> Bool[np.ndarray, "N T"]:
    """The used positions of special tokens; padding is none of them."""
    return heldout.use & np.isin(heldout.tokens, np.asarray(special, np.int64))


def mean_by_context(
    values: Float[np.ndarray, "N T"], mask: Bool[np.ndarray, "N T"]
) -> float:
    """The mean of the contexts' means; NaN without any."""
    some = mask.any(1)
    means = np.where(mask, values, 0)[some].sum(1) / mask[some].sum(1)
    return ratio(float(means.sum()), int(some.sum()))


@partial(jax.jit, static_argnums=0)
def _errors(
    sae: SAE, variables: Variables, x: Float[Array, "B D"], use: Bool[Array, " B"]
) -> Float[Array, " B"]:
    """Of each row; what is not used counts as zeros."""
    x = x.astype(sae.param_dtype)
    out = sae.forward(variables, x, mask=use)
    return jnp.square(x - out.undo(out.x_hats[-1])).mean(1)
