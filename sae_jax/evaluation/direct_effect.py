"""Which tokens a feature makes more or less likely, by the direct path.

Also called the logit lens. With m the mean of the last residual stream and a_j how far
feature j moves the stream where it is active,

    change_j = logits(m + a_j) - logits(m)

as the model itself computes it from its last residual stream on: final norm,
unembedding, and whatever else stands there. What the layers between the site and the
end make of a_j is left out. At m because the final norm divides by the length of what
it is given: a_j alone would be blown up to the length of a whole stream.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from sae_jax.evaluation.gathering import Mean
from sae_jax.evaluation.heldout import HeldOut
from sae_jax.lm.edits import replace
from sae_jax.lm.source import Source
from sae_jax.model import SAE
from sae_jax.treatment import standardise
from sae_jax.variables import Variables

# Places whose values are the residual stream, or are added to it as they are.
STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Effects(NamedTuple):
    """The tokens whose logits change most, strongest first.

    A feature of amount 0 has tokens -1 and changes NaN.
    """

    raised: Int32[np.ndarray, "F tokens"]
    raised_by: Float32[np.ndarray, "F tokens"]
    lowered: Int32[np.ndarray, "F tokens"]
    lowered_by: Float32[np.ndarray, "F tokens"]


def direct_effects(
    lm: Source,
    sae: SAE,
    variables: Variables,
    site: str,
    amounts: Float[np.ndarray, " F"],
    heldout: HeldOut,
    *,
    contexts_per_pass: int = 16,
    n_tokens: int = 8,
) -> Effects | None:
    """The effects of all features, each written by `amounts[j]`, a size of its code.

    `site` is where the SAE writes; None where that is not the residual stream or a
    term of it, such as `head_out` and `mlp_hidden`. In the units of the activations
    a_j is `amounts[j] * d_j`, divided by the constant of treatment "scale". Under
    "standardise" it is different for each row; here it is multiplied by the mean
    standard deviation of the used rows.

    Each position of a pass holds another feature, and the first of them m alone.
    """
    if not _in_stream(lm, site):
        return None
    last = f"resid_post.{lm.n_layers - 1}"
    mean, factor = _typical(lm, sae, variables, site, last, heldout, contexts_per_pass)
    W_dec = factor * np.asarray(sae.weights(variables).W_dec, np.float64)
    tokens = np.zeros((contexts_per_pass, heldout.tokens.shape[1]), np.int32)
    n_tokens = min(n_tokens, lm.config.vocab_size)
    shape = (sae.n_features, n_tokens)
    effects = Effects(
        np.full(shape, -1, np.int32),
        np.full(shape, np.nan, np.float32),
        np.full(shape, -1, np.int32),
        np.full(shape, np.nan, np.float32),
    )
    alive, step = np.flatnonzero(amounts), tokens.size - 1
    for start in range(0, len(alive), step):
        part = alive[start : start + step]
        stream = np.tile(mean, (tokens.size, 1))
        stream[1 : 1 + len(part)] += amounts[part, None] * W_dec[part]
        edit = replace(jnp.asarray(stream.reshape(*tokens.shape, -1), jnp.float32))
        logits = lm.run(tokens, write={last: edit}, logits=True).logits
        assert logits is not None
        found = _extremes(logits.reshape(tokens.size, -1), n_tokens)
        for ours, theirs in zip(effects, found, strict=True):
            ours[part] = np.asarray(theirs)[1 : 1 + len(part)]
    return effects


def _in_stream(lm: Source, site: str) -> bool:
    """Whether a site, by whatever name, is the stream or is added to it as it is."""
    named = [s for s in lm.sites if s.split(".")[0] in STREAM]
    return lm.taps((site,))[site] in lm.taps(named).values()


def _typical(
    lm: Source,
    sae: SAE,
    variables: Variables,
    site: str,
    last: str,
    heldout: HeldOut,
    contexts_per_pass: int,
) -> tuple[Float[np.ndarray, " D"], float]:
    """The mean of the last stream; what a decoder row is multiplied by, on average."""
    stream, spread = Mean(), Mean()
    each_row = sae.treatment == "standardise"
    for part in heldout.passes(contexts_per_pass):
        sites = (site, last) if each_row else (last,)
        values = lm.run(part.tokens, read=sites).values
        rows = {s: v.reshape(-1, v.shape[-1]) for s, v in values.items()}
        used = part.use.reshape(-1)
        stream.add(rows[last], mask=used)
        if each_row:
            spread.add(_std(rows[site]), mask=used)
    if each_row:
        return stream.finish(), float(spread.finish()[0])
    return stream.finish(), 1 / float(variables.constants.get("scale_out", 1))


@jax.jit
def _std(x: Float[Array, "B D"]) -> Float[Array, "B 1"]:
    return standardise(x.astype(jnp.float32))[1].factor


@partial(jax.jit, static_argnums=1)
def _extremes(logits: Float[Array, "B V"], n: int) -> tuple[Array, ...]:
    """The n largest and the n smallest changes from the first row on."""
    change = logits.astype(jnp.float32) - logits[0].astype(jnp.float32)
    raised_by, raised = jax.lax.top_k(change, n)
    lowered_by, lowered = jax.lax.top_k(-change, n)
    return raised, raised_by, lowered, -lowered_by
