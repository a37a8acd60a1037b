"""Top-AFA: as many features as it takes for the code to be as long as the input.

Lee, Davies, Canby, Hockenmaier 2025, arXiv:2503.24277. If a dense vector is a sum of
nearly orthogonal unit directions, z = sum_j f_j v_j, then ||z||^2 = ||f||^2 up to a
cross term of at most eps (||f||_1^2 - ||f||_2^2). So the length of the code can be read
off the input, and with it the number of active features: there is no k.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from sae_jax import codes, select
from sae_jax.contract import (
    Encoded,
    Inputs,
    Params,
    Penalty,
    Rule,
    State,
    register,
)


def top_afa(
    inputs: Inputs,
    params: Params,
    state: State,
    *,
    coef: float | Array = 1 / 32,
    how: select.Cut = "nearest",
    target: Literal["centred", "input"] = "centred",
) -> Encoded:
    """Keeps the strongest features until their norm meets that of the input.

    With `a = relu((x - b_dec) @ W_enc.T)` and strengths `s_j = a_j * ||d_j||`, c_m is
    the norm of the m largest strengths of a row. The m with c_m nearest to the target
    norm stay on (`how="exceed"`: the first m with c_m >= target). Loss term:
    `coef * mean_rows((||codes|| - ||x||)**2)`, which teaches the encoder to be as long
    as its input.

    Which norm is the target differs between sources, so it is an option. The authors'
    code, our default, uses `||x - b_dec||` for the cut and `||x||` (after input
    treatment, not centred) for the loss; the figure of the algorithm writes `||x||^2`
    and compares squares, which can choose another m. `target="input"` uses `||x||`
    for both. The loss reads codes without decoder norms, as the authors' code does.

    Differs: no sort (`select.norm_cut`); keeping everything is never nearest, which the
    authors' code ensures below norms of 1e4 and reverses above. They leave b_enc out
    and so does this rule.

    The coefficient is the only number to choose. On GPT-2 the paper's L0 rises with it;
    on small planted dictionaries ours falls. So its record names no direction.

    Needs: an autoencoder, since the norm of what a transcoder aims at is not known.
    """
    x = inputs.x_centred if target == "centred" else inputs.x
    lengths = jnp.linalg.norm(inputs.weights.W_dec, axis=1)
    chosen = select.norm_cut(
        inputs.pre, jnp.linalg.norm(x, axis=1), lengths=lengths, how=how
    )
    active = select.keep(inputs.encoder, chosen)
    gap = codes.norm(active) - jnp.linalg.norm(inputs.x, axis=1)
    return Encoded(active, state, {"afa": Penalty(coef, jnp.square(gap))})


register(
    Rule(
        name="top_afa",
        paper="Lee et al. 2025 (arXiv:2503.24277)",
        decides="the code's norm: as many features as match the norm of the input",
        encode=top_afa,
        export="It keeps as many features as match each row's norm, and no other "
        "library has a rule that reads the norm of its input.",
        example={"coef": 0.03125},
        knob="coef",
        knob_raises_l0=None,
        needs=frozenset({"autoencoder"}),
        reads_b_enc=False,
    )
)
