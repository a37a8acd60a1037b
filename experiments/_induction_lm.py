"""A small model trained to repeat: its induction heads are known; not an experiment.

Sequences are BOS, a block of random tokens and the same block again; how long it is
differs, so that no position says where to copy from. Two layers of attention with an
MLP of few units: nearly an attention-only model, of a class that every site fits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

BOS, VOCABULARY = 0, 48
SHORTEST, LONGEST = 8, 15  # of a block
LENGTH = 2 * LONGEST + 1


def repeated(
    rng: np.random.Generator, n: int, length: int, vocabulary: int = VOCABULARY
) -> Int[np.ndarray, "n T"]:
    """BOS and a block of `length` different tokens, twice."""
    blocks = rng.permuted(np.tile(np.arange(1, vocabulary), (n, 1)), axis=1)[:, :length]
    return np.concatenate([np.zeros((n, 1)), blocks, blocks], 1).astype(np.int32)


def contrast(
    rng: np.random.Generator, n: int, length: int, vocabulary: int = VOCABULARY
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "n T"]]:
    """Prompts with a block twice, and with the same last block after another one."""
    positive = repeated(rng, n, length, vocabulary)
    negative = positive.copy()
    negative[:, 1 : length + 1] = repeated(rng, n, length, vocabulary)[:, 1:][
        :, :length
    ]
    return positive, negative


def train(
    *, steps: int, batch: int = 64, lr: float = 3e-3, heads: int = 4, seed: int = 0
) -> tuple[Any, list[float]]:
    """The model, and the loss of each step on tokens that can be known."""
    # Imported here: transformers takes seconds.
    from transformers import GPT2Config

    from sae_jax.lm.flax_lm import FlaxLM, next_token_losses

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16 * heads,
        n_layer=2,
        n_head=heads,
        n_inner=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    lm = FlaxLM.random(config, seed=seed)
    optimiser = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, lr, steps // 30, steps, 0.05 * lr),
        b2=0.98,
    )

    def loss_of(params: Any, tokens: Any, known: Any) -> Any:
        logits = lm.forward(params, tokens, logits=True).logits
        losses = next_token_losses(logits, tokens)
        return (losses * known).sum() / known.sum()

    @jax.jit
    def step(params: Any, memory: Any, tokens: Any, known: Any) -> tuple:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, known)
        updates, memory = optimiser.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory, loss

    rng = np.random.default_rng(seed)
    params, losses = lm.params, []
    memory = optimiser.init(params)
    for _ in range(steps):
        tokens = np.zeros((batch, LENGTH), np.int32)
        known = np.zeros((batch, LENGTH - 1), np.float32)
        for half, length in enumerate(rng.integers(SHORTEST, LONGEST + 1, 2)):
            rows = slice(half * batch // 2, (half + 1) * batch // 2)
            tokens[rows, : 2 * length + 1] = repeated(rng, batch // 2, length)
            known[rows, length + 1 : 2 * length] = 1
        params, memory, loss = step(params, memory, jnp.asarray(tokens), known)
        losses.append(loss)
    lm = FlaxLM("induction", lm.module, config, params)
    return lm, [float(loss) for loss in losses]
