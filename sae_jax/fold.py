"""Weights that do without input treatment, as other libraries expect them."""

import dataclasses

from sae_jax.model import SAE
from sae_jax.variables import Variables


def fold_scale(sae: SAE, variables: Variables) -> tuple[SAE, Variables]:
    """The same SAE with the constant of the "scale" treatment inside its weights.

    Codes stay as they are; decoder rows then have the norm 1 / scale, not 1. Export
    needs this: other libraries know no such constant.
    """
    rule = sae.bound.rule
    if sae.treatment != "scale":
        raise ValueError(f"treatment={sae.treatment!r} has no constant to fold in.")
    if rule.fold is None:
        raise ValueError(f"{rule.name} cannot do without its scale (see its record).")
    constants = variables.constants["scale_in"], variables.constants["scale_out"]
    params = rule.fold(variables.params, *constants)
    values = {n: float(sae.bound.hp[n] / constants[0]) for n in rule.lengths}
    bound = dataclasses.replace(
        sae.bound, values=tuple({**sae.bound.hp, **values}.items())
    )
    plain = dataclasses.replace(sae, rule=bound, treatment="none")
    return plain, Variables(params, variables.state, {})
