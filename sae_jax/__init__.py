"""Sparse autoencoders for interpretability research, as pure functions in JAX.

sae = sae_jax.train(activations, "top_afa(coef=0.03125)", n_features=12288)
x_hat, codes = sae(activations)
sae.save("runs/mine")
again = sae_jax.load("runs/mine")
"""

import importlib
import typing

from sae_jax import codes, mesh, over_batch, quasi_orthogonality, select
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
from sae_jax.counterpart import Counterpart
from sae_jax.exchange import load, push_to_hub
from sae_jax.fold import fold_scale
from sae_jax.lm.sites import gradient_of
from sae_jax.losses import AuxK
from sae_jax.model import SAE
from sae_jax.rules import RULES, load_file, parse, register
from sae_jax.run.members import Member
from sae_jax.trained import TrainedSAE
from sae_jax.training.knob import Knob
from sae_jax.training.optim import adam, learning_rate
from sae_jax.training.recipe import Recipe
from sae_jax.training.step import TrainState, init_state, make_step
from sae_jax.variables import Output, Variables

if typing.TYPE_CHECKING:
    from sae_jax.fit import train, train_many
    from sae_jax.run.loop import Every
else:
    # These bring Orbax and grain with them, which take seconds to import.
    _WHEN_ASKED_FOR = {
        "Every": "sae_jax.run.loop",
        "train": "sae_jax.fit",
        "train_many": "sae_jax.fit",
    }

    def __getattr__(name: str) -> typing.Any:
        if name not in _WHEN_ASKED_FOR:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_WHEN_ASKED_FOR[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "RULES",
    "SAE",
    "AuxK",
    "Counterpart",
    "Encoded",
    "Every",
    "Inputs",
    "Knob",
    "Member",
    "Output",
    "Penalty",
    "Recipe",
    "Rule",
    "Signed",
    "Sparse",
    "TrainState",
    "TrainedSAE",
    "Variables",
    "Weights",
    "adam",
    "codes",
    "fold_scale",
    "from_pre",
    "from_selection",
    "gradient_of",
    "init_state",
    "learning_rate",
    "load",
    "load_file",
    "make_step",
    "mesh",
    "over_batch",
    "parse",
    "push_to_hub",
    "quasi_orthogonality",
    "register",
    "require_finite",
    "select",
    "to_dense",
    "train",
    "train_many",
]
