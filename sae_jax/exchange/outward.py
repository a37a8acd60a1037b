"""From an SAE to what formats of other libraries are written from."""

from typing import NamedTuple

import jax
import numpy as np

from sae_jax.counterpart import Counterpart
from sae_jax.fold import fold_scale
from sae_jax.model import SAE
from sae_jax.trained import OWN, TrainedSAE


class Outward(NamedTuple):
    """An SAE in the words that libraries share.

    Attributes:
      sae: its description, after the constant of the "scale" treatment went into the
        weights.
      counterpart: what its rule does to a row.
      weights: the four arrays in NumPy; b_enc is zero where it is not read.
    """

    sae: SAE
    counterpart: Counterpart
    weights: dict[str, np.ndarray]

    def refusal(self, library: str, why: str) -> ValueError:
        """The error where this library cannot say it."""
        return refusal(self.sae, library, why)


def refusal(sae: SAE, library: str, why: str) -> ValueError:
    """The error where a library cannot say an SAE."""
    return ValueError(
        f"{sae.bound.rule.name} cannot be written for {library}: {why} save(folder) "
        f"without a format keeps it in our own, {OWN}."
    )


def outward(trained: TrainedSAE, library: str) -> Outward:
    """The SAE for another library, or the reason why there is no exact counterpart."""
    sae, variables = trained.sae, trained.variables
    export = sae.bound.rule.export
    if isinstance(export, str):
        raise refusal(sae, library, export)
    if sae.treatment == "scale":
        sae, variables = fold_scale(sae, variables)
    said = sae.bound.call(export, variables.params, variables.state)
    held = sae.weights(variables)._asdict(), dict(said.arrays)
    weights, arrays = jax.tree.map(np.asarray, jax.device_get(held))
    if not sae.biased:
        weights["b_enc"] = np.zeros_like(weights["b_enc"])
    return Outward(sae, said._replace(arrays=arrays), weights)


def b_enc_if_centred(outside: Outward) -> np.ndarray:
    """The b_enc with which an encoder of `x - b_dec` sees what this one does.

    Not for a gate, which has two biases.
    """
    W_enc, b_enc, b_dec = (outside.weights[n] for n in ("W_enc", "b_enc", "b_dec"))
    if outside.sae.centred:
        return b_enc
    shift = W_enc.astype(np.float64) @ b_dec.astype(np.float64)
    return (b_enc + shift).astype(b_enc.dtype)
