"""Attention heads one by one: their outputs, their patterns, and a model without some.

Head h of a layer is columns [h d_head, (h+1) d_head) of the site `head_out`; all heads
of a model are numbered layer by layer.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax.lm.edits import Edit, apply
from sae_jax.lm.source import Source

Position = Literal["mean", "last"]


def n_heads(lm: Source) -> int:
    """How many heads a layer has."""
    return int(lm.config.num_attention_heads)


def sites(lm: Source) -> tuple[str, ...]:
    """Where their outputs are."""
    return tuple(f"head_out.{layer}" for layer in range(lm.n_layers))


def outputs(
    lm: Source, tokens: Int[np.ndarray, "N T"], *, skip: int = 0
) -> Float[np.ndarray, "N S H d"]:
    """What every head of the model puts out, from position `skip` on."""
    values = lm.run(tokens, read=sites(lm)).values
    layers = [np.asarray(values[site], np.float32)[:, skip:] for site in sites(lm)]
    split = (*layers[0].shape[:2], n_heads(lm), -1)
    return np.concatenate([layer.reshape(split) for layer in layers], axis=2)


def vectors(
    held: Float[np.ndarray, "N T H d"], position: Position = "mean"
) -> Float[np.ndarray, "N H d"]:
    """One vector of each head and prompt: the mean over positions, or the last."""
    return {"mean": lambda: held.mean(1), "last": lambda: held[:, -1]}[position]()


def patterns(
    lm: Source, tokens: Int[np.ndarray, "N T"]
) -> Float[np.ndarray, "N H T T"]:
    """What each position attends to, from queries and keys: of models like GPT-2.

    The others are refused: their keys are turned by the position, or shared.
    """
    if lm.config.model_type != "gpt2" or lm.family is None:
        raise ValueError(
            f"lm={lm.name!r} is of the family {lm.config.model_type!r}; patterns of "
            f"attention are known of GPT-2's family only."
        )
    names = [
        f"{lm.family.block}.{layer}.{lm.family.attention}.c_attn:out"
        for layer in range(lm.n_layers)
    ]
    values = lm.run(tokens, read=names).values
    found = [_pattern(values[name], n_heads(lm)) for name in names]
    return np.concatenate([np.asarray(one) for one in found], axis=1)


def _pattern(qkv: Float[Array, "N T QKV"], n: int) -> Float[Array, "N H T T"]:
    query, key, _ = jnp.split(qkv.astype(jnp.float32), 3, axis=-1)
    query, key = (a.reshape(*a.shape[:2], n, -1) for a in (query, key))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)


def induction(
    lm: Source, tokens: Int[np.ndarray, "N T"], length: int
) -> Float[np.ndarray, " H"]:
    """How much heads attend from the second of two blocks to what came next before.

    `tokens` are BOS and a block of `length` tokens, twice. The mean attention from
    each token of the second block to the token after its first occurrence.
    """
    found = patterns(lm, tokens)
    at = np.arange(length + 1, 2 * length + 1)
    return found[:, :, at, at - length + 1].mean((0, 2))


def keep(
    lm: Source, kept: Bool[np.ndarray, " H"], means: Float[np.ndarray, "H d"]
) -> dict[str, Edit]:
    """Edits that put their means in place of all heads that are not kept."""
    per_layer = n_heads(lm)
    edits = {}
    for layer, site in enumerate(sites(lm)):
        own = slice(layer * per_layer, (layer + 1) * per_layer)
        wide = np.repeat(kept[own], means.shape[1])
        mean = jnp.asarray(means[own].reshape(-1), jnp.float32)
        edits[site] = apply(_kept, jnp.asarray(wide), mean)
    return edits


def _kept(old: Array, kept: Array, mean: Array) -> Array:
    return jnp.where(kept, old, mean)


def losses_keeping(
    lm: Source,
    tokens: Int[np.ndarray, "N T"],
    choices: Sequence[Bool[np.ndarray, " H"]],
    means: Float[np.ndarray, "H d"],
    *,
    last: int,
) -> Float[np.ndarray, " n"]:
    """The mean loss of the `last` tokens with some heads kept, for each choice."""
    found = []
    for kept in choices:
        run = lm.run(tokens, write=keep(lm, kept, means), losses=True)
        found.append(float(np.asarray(run.losses)[:, -last:].mean()))
    return np.array(found)
