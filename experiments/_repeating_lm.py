"""A small model trained to repeat: which heads copy is known; not an experiment.

Sequences are BOS, a block of random tokens and the same block again, always as long, so
that positions say where to copy from and one layer is enough. (Trained on blocks of
several lengths the model found a way in which no head attends to one token.) Two layers
of attention with an MLP of few units: nearly an attention-only model, of a class that
every site fits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

BOS, VOCABULARY = 0, 48


def blocks(
    rng: np.random.Generator, n: int, length: int, vocabulary: int = VOCABULARY
) -> Int[np.ndarray, "n L"]:
    """Random tokens, all different within a block."""
    rows = np.tile(np.arange(1, vocabulary, dtype=np.int32), (n, 1))
    return rng.permuted(rows, axis=1)[:, :length]


def after(
    first: Int[np.ndarray, "n L"], second: Int[np.ndarray, "n L"], bos: int = BOS
) -> Int[np.ndarray, "n T"]:
    """BOS and two blocks: a positive prompt where they are the same."""
    start = np.full((len(first), 1), bos, np.int32)
    return np.concatenate([start, first, second], axis=1).astype(np.int32)


def train(
    *,
    steps: int,
    length: int = 12,
    batch: int = 64,
    lr: float = 3e-3,
    heads: int = 4,
    seed: int = 0,
) -> tuple[Any, list[float]]:
    """The model, and the loss of each step on tokens that can be known."""
    # Imported here: transformers takes seconds.
    from transformers import GPT2Config

    from sae_jax.lm.flax_lm import FlaxLM, next_token_losses

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=2 * length + 1,
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

    def loss_of(params: Any, tokens: Any) -> Any:
        logits = lm.forward(params, tokens, logits=True).logits
        return next_token_losses(logits, tokens)[:, length + 1 :].mean()

    @jax.jit
    def step(params: Any, memory: Any, tokens: Any) -> tuple:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens)
        updates, memory = optimiser.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory, loss

    rng = np.random.default_rng(seed)
    params, losses = lm.params, []
    memory = optimiser.init(params)
    for _ in range(steps):
        block = blocks(rng, batch, length)
        tokens = jnp.asarray(after(block, block))
        params, memory, loss = step(params, memory, tokens)
        losses.append(loss)
    lm = FlaxLM("repeating", lm.module, config, params)
    return lm, [float(loss) for loss in losses]
