"""The Top-AFA authors' losses, summed in float32 as PyTorch sums on a CPU.

Their `.float()` rounds what they average to float32 even in a float64 run, and PyTorch
adds in float32. Such a sum depends on the order of its additions by more than the
spacing of float32 (1.2e-7), so a recorded loss is met only in the recording's order.
For n numbers that lie next to one another, in vectors of L = 8 lanes, that order is:

1. The first n - n % L numbers are cut into vectors. Vector v goes to accumulator v % 4;
   those left over when the vectors do not come in fours go to accumulator 0, last.
2. Each accumulator is a cascade of four levels: every 16 vectors (16^2, 16^3) a level
   is emptied into the one above. At the end the levels are added in turn.
3. The four accumulators are added in turn, lane by lane.
4. The last n % L numbers are added one after the other, then to them the lanes.

With n < 8 the same holds for L = 1. Not repeated here: from 32768 numbers on, PyTorch
shares a sum among threads.

Sources: PyTorch, aten/src/ATen/native/cpu/SumKernel.cpp (cascade_sum); equal to
torch.sum of release 2.13 bit for bit, for every n up to 2000 and some up to 32767, with
its default, AVX2 and AVX512 kernels. SewoongLee/top-afa-sae, training/sae.py
(get_loss_dict, get_auxiliary_loss), commit 2190aab.
"""

import jax.numpy as jnp
import numpy as np

from sae_jax import select, to_dense
from sae_jax.training.terms import dead

LANES, ACCUMULATORS, LEVELS, LEVEL_STEP = 8, 4, 4, 16


def torch_sum(x: np.ndarray) -> np.ndarray:
    """The sum over the last axis, in float32 and in PyTorch's order."""
    x = np.moveaxis(np.asarray(x, np.float32), -1, 0)
    lanes = LANES if len(x) >= LANES else 1
    whole = len(x) - len(x) % lanes
    vectors = x[:whole].reshape(-1, lanes, *x.shape[1:])
    in_fours = len(vectors) - len(vectors) % ACCUMULATORS
    fours = vectors[:in_fours].reshape(-1, ACCUMULATORS, *vectors.shape[1:])

    first, *others = cascade(fours)
    per_lane = in_turn(in_turn(first, vectors[in_fours:]), others)
    tail = in_turn(np.zeros(x.shape[1:], np.float32), x[whole:])
    return in_turn(tail, per_lane)


def cascade(rows: np.ndarray) -> np.ndarray:
    """The sum over the first axis, through levels that are emptied upwards."""
    levels = np.zeros((LEVELS, *rows.shape[1:]), np.float32)
    for count, row in enumerate(rows, start=1):
        levels[0] += row
        for level in range(1, LEVELS):
            if count % LEVEL_STEP**level == 0:
                levels[level] += levels[level - 1]
                levels[level - 1] = 0
    return in_turn(levels[0], levels[1:])


def in_turn(total, terms):
    """`total` plus each term, one after the other."""
    for term in terms:
        total = total + term
    return total


def exact_sum(x: np.ndarray) -> np.ndarray:
    """The sum over the last axis in float64, where the order does not matter."""
    return np.sum(x, axis=-1, dtype=np.float64)


def summands(sae, aux, counts: bool, variables, steps_idle, x) -> dict:
    """What their losses average, in float32: squared errors, and codes `[B, F]`.

    Of codes only the number where `counts`. All from a forward pass of ours, ahead of
    the step on batch `x`.
    """
    out = sae.forward(variables, x, train=True)
    target, x_hat = (a.astype(jnp.float32) for a in (out.target, out.x_hats[-1]))
    codes = to_dense(out.codes)
    terms = {
        "l2": jnp.square(x_hat - target),
        "l1": (codes > 0 if counts else codes).astype(jnp.float32),
        "aux": jnp.zeros_like(target),
    }
    if aux is not None:
        idle = dead(jnp.where((codes > 0).any(0), 0, steps_idle + 1), aux)
        scores = jnp.where(idle, out.encoder.pre, -jnp.inf)
        chosen = select.rows(scores, idle.sum(), count_max=aux.k)
        revived = to_dense(select.keep(out.encoder, chosen)) @ out.weights.W_dec
        error = revived.astype(jnp.float32) - (target - x_hat)
        terms["aux"] = jnp.where(idle.any(), jnp.square(error), 0)
    return terms


def losses(config: dict, terms: dict, afa: np.float64, total) -> dict:
    """Their losses from these terms, with every sum taken by `total`."""

    def mean(values):
        return total(values.reshape(-1)) / np.float32(values.size)

    l2 = mean(terms["l2"])
    l1 = np.float32(config["l1_coeff"]) * mean(total(terms["l1"]))
    aux = np.float32(config["aux_penalty"]) * mean(terms["aux"])
    return {"loss": l2 + l1 + aux + afa, "l2_loss": l2, "l1_loss": l1, "aux_loss": aux}
