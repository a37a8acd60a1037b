"""Planted heads: vectors of prompts in which some heads see the task; no experiment.

Each head has a vector for each of a few templates, drawn from N(0, 1), to which every
prompt adds noise; in positive prompts those of the circuit are moved by a vector of
their own, drawn from N(0, 4).
"""

from itertools import repeat
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

import sae_jax
from sae_jax.analysis import circuits
from sae_jax.training.recipe import Recipe

TEMPLATES, WIDTH = 3, 16


class Planted(NamedTuple):
    """Vectors of both kinds of prompts, and which heads are in the circuit."""

    positive: Float[np.ndarray, "N H d"]
    negative: Float[np.ndarray, "N H d"]
    circuit: Bool[np.ndarray, " H"]


def plant(
    seed: int, *, heads: int = 24, inside: int = 6, prompts: int = 10, noise: float
) -> Planted:
    """Prompts of both kinds, as many of each."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(TEMPLATES, heads, WIDTH))
    circuit = np.zeros(heads, bool)
    circuit[rng.choice(heads, inside, replace=False)] = True
    shift = circuit[:, None] * rng.normal(0, 2, size=(heads, WIDTH))
    templates = rng.integers(TEMPLATES, size=(2, prompts))
    held = base[templates] + noise * rng.normal(size=(2, prompts, heads, WIDTH))
    return Planted(held[0] + shift, held[1], circuit)


def codes_of(
    positive: Float[np.ndarray, "P H d"],
    negative: Float[np.ndarray, "N H d"],
    rule: str,
    *,
    n_features: int = 128,
    steps: int = 500,
    lr: float = 3e-3,
    seed: int = 0,
) -> tuple[Int[np.ndarray, "P H"], Int[np.ndarray, "N H"]]:
    """Codes of all vectors by one SAE that was trained on them, whole at each step."""
    rows = circuits.standardised(np.concatenate([positive, negative]))
    sae = sae_jax.train(
        repeat(rows),  # used whole: nothing to shuffle, which would take longest
        rule,
        n_features=n_features,
        recipe=Recipe(steps=steps, lr=lr),
        seed=seed,
        progress=False,
    )
    codes = circuits.discrete(np.asarray(sae.encode(rows)))
    codes = codes.reshape(-1, positive.shape[1])
    return codes[: len(positive)], codes[len(positive) :]
