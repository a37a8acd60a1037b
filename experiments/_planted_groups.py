"""Planted neuron groups: how many are found by what; not an experiment.

Rows are codes times groups: codes uniform from 0 to 1, in every row, and groups of a
few neurons, drawn independently (they may share some), with standard normal weights.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

import sae_jax
from sae_jax.analysis.snmf.factors import factorise, unexplained
from sae_jax.training.recipe import Recipe

FOUND = 0.95  # a cosine


class Planted(NamedTuple):
    """What is planted, and the rows."""

    rows: Float[np.ndarray, "T N"]
    groups: Float[np.ndarray, "K N"]


def plant(
    seed: int, *, rows: int = 600, neurons: int = 200, k: int = 8, of: int = 4
) -> Planted:
    """`k` groups of `of` neurons each."""
    rng = np.random.default_rng(seed)
    groups = np.zeros((k, neurons))
    for group in groups:
        group[rng.choice(neurons, of, replace=False)] = rng.normal(size=of)
    codes = rng.uniform(size=(rows, k))
    return Planted((codes @ groups).astype(np.float32), groups)


def matched(
    groups: Float[np.ndarray, "K N"], found: Float[np.ndarray, "K N"]
) -> Float[np.ndarray, " K"]:
    """|cos| of each planted group with its own found one, the best assignment."""

    def unit(a: np.ndarray) -> np.ndarray:
        return a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)

    cosines = np.abs(unit(groups) @ unit(np.asarray(found, np.float64)).T)
    return cosines[linear_sum_assignment(-cosines)]


def compare(
    seed: int, rule: str, *, steps: int, sae_steps: int
) -> dict[str, dict[str, float]]:
    """What each method finds of one planting: groups, mean |cos|, error.

    `shuffled`: the groups of the first with their neurons permuted.
    """
    planted = plant(seed)
    k, neurons = planted.groups.shape
    x = jnp.asarray(planted.rows)
    share = (planted.groups != 0).sum(1).mean() / neurons
    found = {
        name: factorise(x, k, share=s, steps=steps, seed=seed)
        for name, s in (("snmf", share), ("snmf_all", 1.0))
    }
    recipe = Recipe(steps=sae_steps, lr=3e-3, warmup=20, decay="linear")
    sae = sae_jax.train(
        x, rule, n_features=k, batch=200, recipe=recipe, seed=seed, progress=False
    )
    groups = {name: np.asarray(one.groups) for name, one in found.items()}
    groups["sae"] = np.asarray(sae.variables.params["W_dec"])
    order = np.random.default_rng(seed).permutation(neurons)
    groups["shuffled"] = groups["snmf"][:, order]
    errors = {
        name: unexplained(x, one.codes, one.groups) for name, one in found.items()
    }
    wrong = np.square(planted.rows - np.asarray(sae(x)[0])).sum()
    errors["sae"] = float(wrong / np.square(planted.rows).sum())
    rows = {}
    for name, own in groups.items():
        cosines = matched(planted.groups, own)
        rows[name] = {
            "found": int((cosines > FOUND).sum()),
            "cosine": float(cosines.mean()),
            "error": errors.get(name, float("nan")),
        }
    return rows
