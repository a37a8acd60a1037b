"""What an SAE makes of rows, as a sum over its features in the rows' own units."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sae_jax import codes
from sae_jax.analysis.principled.supervised import Decomposed
from sae_jax.trained import TrainedSAE

AT_ONCE = 512


def decomposed(
    one: TrainedSAE, rows: Float[np.ndarray, "N D"], *, at_once: int = AT_ONCE
) -> Decomposed:
    """Strengths, directions and bias of rows.

    What a treatment did to a row is undone in its strengths and its bias, whether by
    one constant for all or by the row's own spread and mean. So features are edited in
    the units of the activations, and nothing is left to undo afterwards.
    """
    if one.sae.is_transcoder:
        raise ValueError(
            f"{one.sae!r} is a transcoder; what it writes is no part of what it reads."
        )
    forward = jax.jit(one.sae.forward)
    strengths, biases = [], []
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        padded = np.pad(part, ((0, at_once - len(part)), (0, 0)))
        mask = jnp.arange(at_once) < len(part)
        out = forward(one.variables, jnp.asarray(padded, jnp.float32), mask=mask)
        factor = np.asarray(out.undo.factor, np.float64)
        active = np.asarray(codes.to_dense(out.codes), np.float64)
        bias = out.undo(jnp.broadcast_to(out.weights.b_dec, padded.shape))
        n = len(part)
        strengths.append((active * factor)[:n])
        biases.append(np.asarray(bias, np.float64)[:n])
    weights = one.sae.weights(one.variables)
    directions = np.asarray(weights.W_dec, np.float64)
    return Decomposed(np.concatenate(strengths), directions, np.concatenate(biases))
