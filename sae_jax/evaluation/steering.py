"""Steering: a language model goes on with some features changed and all else kept.

    edit = clamp(sae, [12], 8.0)
    new = generate(lm, prompts, 40, write={"resid_post.2": edit})

Of a row x at the site with codes f, chosen features change, and the site becomes

    x + decode(f') - decode(f)   =   x_hat' + (x - x_hat)

so that what the SAE does not explain of x stays (as in Templeton et al. 2024, Scaling
Monosemanticity). Decoding is linear in the codes, so only the chosen decoder rows are
multiplied: a feature that does not change adds an exact 0, whatever the SAE's error.

    add      f'_j = f_j + amount
    clamp    f'_j = amount
    scale    f'_j = amount * f_j
    ablate   f'_j = 0

Both `add` and `clamp` act in every row, whether or not the rule had the feature active
there, and nothing is clipped: f' may be what no rule would give. Their amounts are in
units of the codes, whose size differs from feature to feature: what people choose is a
multiple of the feature's largest value on text, `Catalogue.highest`. `scale` acts only
where a feature is active.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax import checks, codes, products
from sae_jax.lm.edits import Edit, apply
from sae_jax.model import SAE
from sae_jax.trained import TrainedSAE
from sae_jax.variables import Variables

Features = Sequence[int] | Int[Array | np.ndarray, " n"]
Amounts = float | Sequence[float] | Float[Array | np.ndarray, " n"]
Where = Bool[Array, "B T"] | None
How = Literal["add", "clamp", "scale"]


def add(
    sae: TrainedSAE, features: Features, amounts: Amounts, *, where: Where = None
) -> Edit:
    """Adds to features; one amount for all, or one for each.

    Each row moves by amount * W_dec[j], times the row's own spread under the treatment
    "standardise": the codes themselves play no part.
    """
    return _edit("add", sae, features, amounts, where)


def clamp(
    sae: TrainedSAE, features: Features, amounts: Amounts, *, where: Where = None
) -> Edit:
    """Sets features to amounts; one for all, or one for each."""
    return _edit("clamp", sae, features, amounts, where)


def scale(
    sae: TrainedSAE, features: Features, amounts: Amounts, *, where: Where = None
) -> Edit:
    """Multiplies features by amounts; rows with none of them active stay as they are.

    Negative amounts turn a feature round.
    """
    return _edit("scale", sae, features, amounts, where)


def ablate(sae: TrainedSAE, features: Features, *, where: Where = None) -> Edit:
    """Sets features to 0; rows in which none of them is active stay as they are."""
    return _edit("clamp", sae, features, 0.0, where)


def _edit(
    how: How,
    sae: TrainedSAE,
    features: Features,
    amounts: Amounts,
    where: Where,
) -> Edit:
    """Ids and amounts are arguments of the edit, so others do not compile again."""
    checks.raise_all(_faults(sae.sae, np.asarray(features), np.asarray(amounts)))
    ids = jnp.asarray(features)
    values = jnp.broadcast_to(jnp.asarray(amounts, sae.sae.param_dtype), ids.shape)
    return apply(_Steer(sae.sae, how), sae.variables, ids, values, where=where)


@dataclasses.dataclass(frozen=True)
class _Steer:
    """The function of the edits; equal ones share one compiled program."""

    sae: SAE
    how: How

    def __call__(
        self,
        old: Float[Array, "B T D"],
        variables: Variables,
        features: Int[Array, " n"],
        amounts: Float[Array, " n"],
    ) -> Float[Array, "B T D"]:
        rows = old.reshape(-1, old.shape[-1])
        out = self.sae.forward(variables, rows)
        change = jnp.broadcast_to(amounts, (len(rows), len(amounts)))
        if self.how != "add":
            active = codes.to_dense(out.codes)[:, features]
            change = (amounts if self.how == "clamp" else amounts * active) - active
        # Few rows of the decoder: not rounded, even where the SAE's products are.
        directions = out.weights.W_dec[features]
        moved = products.dot(change, directions, self.sae.param_dtype) * out.undo.factor
        return (rows + moved).reshape(old.shape)


def _faults(sae: SAE, features: np.ndarray, amounts: np.ndarray) -> list[str]:
    faults: list[Any] = []
    if sae.is_transcoder:
        faults.append(
            "A transcoder reads one site and writes another, so it has no features of "
            "the site to change; steer with an autoencoder."
        )
    if features.ndim != 1 or not features.size or features.dtype.kind not in "iu":
        faults.append(
            f"features is {features.dtype}{list(features.shape)}; needed is a list of "
            f"one or more ids, such as [12]."
        )
    else:
        outside = [int(j) for j in features if not 0 <= j < sae.n_features]
        if outside:
            faults.append(
                f"features {outside} are none of this SAE's, 0 to {sae.n_features - 1}."
            )
        if len(set(features.tolist())) < len(features):
            faults.append("features has an id twice; give each once, with its amount.")
        if amounts.shape not in ((), features.shape):
            faults.append(
                f"amounts has shape {list(amounts.shape)}; needed is one number, or "
                f"one for each of the {len(features)} features."
            )
    if amounts.dtype.kind not in "iuf" or not np.isfinite(amounts).all():
        faults.append(f"amounts={amounts.tolist()} must be finite numbers.")
    return faults
