"""Sparse autoencoders for interpretability research, as pure functions in JAX.

sae = SAE(d_in=768, n_features=12288, rule="top_afa(coef=0.03125)")
optimiser = adam(learning_rate(3e-4, steps=20_000, warmup=500))
state = init_state(sae, optimiser, jax.random.key(0))
step = make_step(sae, optimiser)
state, metrics = step(state, {"x": activations})
codes = sae.encode(state.variables, activations)
"""

from sae_jax import codes, over_batch, quasi_orthogonality, select
from sae_jax.checks import Signed, require_finite
from sae_jax.codes import Sparse, to_dense
from sae_jax.contract import (
    Encoded,
    Inputs,
    Penalty,
    Rule,
    Weights,
    from_pre,
    from_selection,
)
from sae_jax.fold import fold_scale
from sae_jax.losses import AuxK
from sae_jax.model import SAE
from sae_jax.rules import RULES, load_file, parse, register
from sae_jax.training.knob import Knob
from sae_jax.training.optim import adam, learning_rate
from sae_jax.training.step import TrainState, init_state, make_step
from sae_jax.variables import Output, Variables

__all__ = [
    "RULES",
    "SAE",
    "AuxK",
    "Encoded",
    "Inputs",
    "Knob",
    "Output",
    "Penalty",
    "Rule",
    "Signed",
    "Sparse",
    "TrainState",
    "Variables",
    "Weights",
    "adam",
    "codes",
    "fold_scale",
    "from_pre",
    "from_selection",
    "init_state",
    "learning_rate",
    "load_file",
    "make_step",
    "over_batch",
    "parse",
    "quasi_orthogonality",
    "register",
    "require_finite",
    "select",
    "to_dense",
]
