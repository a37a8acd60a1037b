"""Text from a language model, token by token, with or without edits.

    new = generate(lm, [[0, 17, 4], [0, 9]], 40, write={"resid_post.2": add(direction)})

It needs of a model only `Source.run`, so that every source and every edit works. The
price is a pass over the whole buffer, T = longest prompt + n_new positions, for each
token: n_new * T positions in all, where a cache of keys and values would do with T; and
logits at all of them, B * T * vocabulary numbers on the device.

The buffer has one length from first to last token, so that the model is compiled once;
what is not written yet stands on the right, where no earlier position sees it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax import checks
from sae_jax.lm.edits import Edit
from sae_jax.lm.source import Source

Prompts = Sequence[Sequence[int]] | Int[Array | np.ndarray, "B _"]


def generate(
    source: Source,
    prompts: Prompts,
    n_new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: Array | None = None,
    write: Mapping[str, Edit] | None = None,
    stop_token: int | None = None,
) -> Int[np.ndarray, "B n_new"]:
    """The `n_new` tokens that follow each prompt.

    Args:
        source: Any language model.
        prompts: Token ids, one list per prompt, of any lengths; most models want
            their BOS at the beginning.
        n_new: How many tokens to add.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from
            softmax(logits / temperature).
        top_k: Draws among the k likeliest only.
        key: What the draws depend on; needed above temperature 0. Runs with the same
            key draw with the same noise, so that they differ by their edits alone.
        write: Edits, as in `Source.run`. They see the buffer: `where`, if given, is
            [B, T], and row b's prompt stands at its left end, its new tokens next;
            see `choosing_positions`.
        stop_token: Ends a row; it fills what would have followed.
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    checks.raise_all(_prompt_faults(rows))
    lengths = np.array([len(row) for row in rows])
    length = int(lengths.max()) + n_new
    checks.raise_all(
        _option_faults(source, lengths, n_new, temperature, top_k, key, stop_token)
        + _where_faults(write or {}, (len(rows), length))
    )
    tokens = np.zeros((len(rows), length), np.int32)
    for held, row in zip(tokens, rows, strict=True):
        held[: len(row)] = row
    source.require_fit(tokens)
    stop = -1 if stop_token is None else stop_token  # no token is -1
    new = np.full((len(rows), n_new), stop, np.int32)
    ended = np.zeros(len(rows), bool)
    for step in range(n_new):
        logits: Any = source.run(tokens, write=write, logits=True).logits
        noise = None
        if key is not None and temperature > 0:
            noise = jax.random.fold_in(key, step)
        at = lengths + step
        chosen = np.asarray(_choose(logits, at - 1, temperature, noise, top_k=top_k))
        new[:, step] = np.where(ended, stop, chosen)
        ended |= chosen == stop
        if ended.all():
            break
        tokens[np.arange(len(rows)), at] = np.where(ended, 0, chosen)
    return new


def choosing_positions(prompts: Prompts, n_new: int) -> Bool[Array, "B T"]:
    """Where the new tokens are chosen: at the last of a prompt and all after it.

    The `where` of an edit that leaves alone how the prompt before is read. (An edit of
    the new positions only would come too late for the first new token.)
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    checks.raise_all(_prompt_faults(rows))
    lengths = np.array([len(row) for row in rows])
    positions = np.arange(lengths.max() + n_new)
    return jnp.asarray(positions >= lengths[:, None] - 1)


@partial(jax.jit, static_argnames="top_k")
def _choose(
    logits: Float[Array, "B T V"],
    at: Int[Array | np.ndarray, " B"],
    temperature: float | Array,
    key: Array | None,
    *,
    top_k: int | None,
) -> Int[Array, " B"]:
    """One token per row, chosen where the logits are; only it goes to the host."""
    scores = logits[jnp.arange(len(at)), at].astype(jnp.float32)
    if key is None:
        return scores.argmax(axis=1)
    if top_k is None:
        return jax.random.categorical(key, scores / temperature)
    scores, ids = jax.lax.top_k(scores, top_k)
    drawn = jax.random.categorical(key, scores / temperature)
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]


def _prompt_faults(rows: list[np.ndarray]) -> list[str]:
    if not rows:
        return ["There are no prompts; give at least one list of token ids."]
    return [
        f"prompts[{i}] is {row.dtype}{list(row.shape)}; needed is a list of one or "
        f"more token ids."
        for i, row in enumerate(rows)
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu"
    ]


def _option_faults(
    source: Source,
    lengths: np.ndarray,
    n_new: int,
    temperature: float,
    top_k: int | None,
    key: Array | None,
    stop_token: int | None,
) -> list[str]:
    size = source.config.vocab_size
    faults = [
        checks.value_fault("n_new", n_new, int),
        checks.value_fault("temperature", temperature, float),
    ]
    checks.raise_all(filter(None, faults))
    if n_new == 0:
        faults.append("n_new=0; at least one is needed.")
    if temperature == 0 and top_k is not None:
        faults.append(f"top_k={top_k} is for draws: pass a temperature above 0.")
    if temperature > 0 and key is None:
        faults.append(
            f"temperature={temperature} draws tokens: pass a key, or temperature=0."
        )
    if top_k is not None and not 1 <= top_k <= size:
        faults.append(f"top_k={top_k} must be from 1 to the vocabulary, {size}.")
    if stop_token is not None and not 0 <= stop_token < size:
        faults.append(f"stop_token={stop_token} is outside the vocabulary, {size}.")
    if lengths.max() + n_new > source.context:
        faults.append(
            f"Prompts of up to {lengths.max()} tokens and n_new={n_new} pass the "
            f"context of {source.name!r}, which is {source.context}; shorten either."
        )
    return [fault for fault in faults if fault]


def _where_faults(write: Mapping[str, Edit], shape: tuple[int, int]) -> list[str]:
    return [
        f"The edit at {site} has where{list(edit.where.shape)}; here it is "
        f"{list(shape)}, prompts and new tokens (see choosing_positions)."
        for site, edit in write.items()
        if edit.where is not None and edit.where.shape != shape
    ]
