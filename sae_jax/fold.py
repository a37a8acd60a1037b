"""Weights that do without input treatment, as other libraries expect them."""

import dataclasses

from sae_jax.model import SAE
from sae_jax.variables import Variables


def fold_scale(sae: SAE, variables: Variables) -> tuple[SAE, Variables]:
    """The same SAE with the constant of the "scale" treatment inside its weights.

    Codes stay as they are, since pre-activations do; decoder rows then have the norm
    1 / scale, not 1. Export needs this: other libraries know no such constant.
    """
    if sae.treatment != "scale":
        raise ValueError(f"treatment={sae.treatment!r} has no constant to fold in.")
    params = dict(variables.params)
    if "W_enc" not in params:
        raise ValueError(
            f"{sae.bound.rule.name} ties its encoder; it cannot be scaled."
        )
    params["W_enc"] = params["W_enc"] * variables.constants["scale_in"]
    params["W_dec"] = params["W_dec"] / variables.constants["scale_out"]
    params["b_dec"] = params["b_dec"] / variables.constants["scale_out"]
    plain = dataclasses.replace(sae, treatment="none")
    return plain, Variables(params, variables.state, {})
