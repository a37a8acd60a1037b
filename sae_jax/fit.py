"""Training from a notebook: `sae_jax.train(activations, rule=...)`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sae_jax import checks
from sae_jax.activations.in_memory import Given, InMemory
from sae_jax.lm.files import fingerprint
from sae_jax.lm.sites import without_gradients
from sae_jax.model import SAE
from sae_jax.rules import RULES
from sae_jax.run.in_folder import train_in_folder
from sae_jax.run.loop import EVERY, Evaluate, Every, Loop
from sae_jax.run.members import Member, Stream
from sae_jax.trained import TrainedSAE, describe, rows_of
from sae_jax.training.recipe import Recipe
from sae_jax.variables import Variables

RECIPE = Recipe()
ONLY = "x"  # the site of activations that come without a name
FIELDS = ("treatment", "b_dec_start", "centre", "encoder_bias", "dtype")
CALL = ("folder", "every", "evaluate", "progress")


def train(
    activations: Any,
    rule: str | None = None,
    *,
    n_features: int | None = None,
    recipe: Recipe = RECIPE,
    batch: int = 1024,
    seed: int = 0,
    start: TrainedSAE | None = None,
    **options: Any,
) -> TrainedSAE:
    """Trains one SAE on activations; gives it back with its history.

    Args:
      activations: an array `[..., D]`, of PyTorch too, whose rows are shuffled; an
        iterator of such, each used whole as it comes; or a stream of one site, such as
        `OnTheFly`. With gradients of the model's loss beside, for rules that need
        them: `{"x": array, gradient_of("x"): array}`.
      rule: the sparsity rule, such as "topk(k=32)"; by default that of `start`.
      n_features: size of the dictionary; by default 16 features for each dimension.
      recipe: how it is trained; the end of an iterator also ends the training.
      batch: rows per step, of arrays.
      seed: decides start, order of the rows, and whatever else is random.
      start: an SAE to start from. Under another rule, what that rule learns besides
        the four arrays starts fresh, and of its memory what the rule before has not,
        by name and shape.
      **options: further fields of `SAE` (`treatment`, `b_dec_start`, `centre`,
        `encoder_bias`, `dtype`), and the last arguments of `train_many` (`folder`,
        `every`, `evaluate`, `progress`).
    """
    checks.raise_all(
        checks.unknown("option", name, (*FIELDS, *CALL))
        for name in options
        if name not in (*FIELDS, *CALL)
    )
    stream = as_stream(activations, batch, seed)
    sites = without_gradients(stream.widths)
    if len(sites) != 1:
        raise ValueError(
            f"train() takes one site, given are {', '.join(sites)}; see train_many()."
        )
    [site] = sites
    width = stream.widths[site]
    chosen = {name: options.pop(name) for name in FIELDS if name in options}
    if start is None:
        if rule is None:
            raise ValueError(f"rule is needed, one of {', '.join(RULES)}.")
        n_features = 16 * width if n_features is None else n_features
        sae = SAE(d_in=width, n_features=n_features, rule=rule, **chosen)
        variables = None
    else:
        chosen |= {} if rule is None else {"rule": rule}
        chosen |= {} if n_features is None else {"n_features": n_features}
        sae = dataclasses.replace(start.sae, **chosen)
        variables = warm(sae, start, seed)
    name = sae.bound.rule.name
    members = {name: Member(sae, site, seed=seed, start=variables)}
    return train_many(stream, members, recipe, seed=seed, **options)[name]


def train_many(
    activations: Any,
    members: Mapping[str, Member],
    recipe: Recipe = RECIPE,
    *,
    batch: int = 1024,
    seed: int = 0,
    folder: str | Path | None = None,
    every: Every = EVERY,
    evaluate: Evaluate | None = None,
    progress: bool = True,
) -> dict[str, TrainedSAE]:
    """Trains several SAEs, of the same or of different sites, on one pass.

    Args:
      activations: as for `train`; `{site: array}`, an iterator of such, or a stream.
      members: the SAEs, by name.
      recipe: how they are trained.
      batch: rows per step, of arrays.
      seed: order of the rows, of arrays.
      folder: where to keep checkpoints, metrics and the SAEs; after an interrupt the
        same call goes on from the newest checkpoint. None: nothing is written.
      every: how often to log, evaluate and save.
      evaluate: called with the name, description and arrays of each SAE.
      progress: whether to show a bar.
    """
    stream = as_stream(activations, batch, seed)
    if folder is None:
        loop = Loop(
            members, stream, recipe, every=every, evaluate=evaluate, progress=progress
        )
        return loop.run()
    config = {
        "members": {
            name: {**member._asdict(), "sae": describe(member.sae)}
            | {"start": member.start and fingerprint(member.start)}
            for name, member in members.items()
        },
        "recipe": dataclasses.asdict(recipe),
        "every": dataclasses.asdict(every),
        "batch": stream.batch,
        "seed": seed,
    }
    return train_in_folder(
        folder,
        config,
        members,
        stream,
        recipe,
        every=every,
        evaluate=evaluate,
        progress=progress,
    )


def as_stream(activations: Any, batch: int, seed: int) -> Stream:
    """Arrays and iterators as streams of batches; streams as they are."""
    if hasattr(activations, "batches") and hasattr(activations, "position"):
        return activations
    if isinstance(activations, Mapping):
        return InMemory(_named(activations), batch=batch, seed=seed)
    if hasattr(activations, "shape"):
        return InMemory(_named({ONLY: activations}), batch=batch, seed=seed)
    if hasattr(activations, "__iter__"):
        return Given(map(_rows_of_one, activations), ONLY)
    raise ValueError(
        f"activations is a {type(activations).__name__}; give an array [..., D], an "
        f"iterator of arrays [B, D], or a stream of sae_jax.activations."
    )


def warm(sae: SAE, start: TrainedSAE, seed: int) -> Variables:
    """The arrays to start with: all of `start`, or what another rule has use for.

    Those are the four arrays, and memory of the same name and shape: what features did
    so far is as true under the new rule.
    """
    checks.raise_all(
        f"start was made with {name}={getattr(start.sae, name)!r}, not "
        f"{getattr(sae, name)!r}; leave the {name} as it was."
        for name in ("treatment", "b_dec_start")
        if getattr(sae, name) != getattr(start.sae, name)
    )
    variables, before = start.variables, start.sae.bound
    if sae.bound.rule is not before.rule:
        four = before.call(before.rule.weights, variables.params, variables.state)
        params, state = sae.bound.call(
            sae.bound.rule.init, jax.random.key(seed), four._asdict()
        )
        known = {
            name: value
            for name, value in variables.state.items()
            if name in state and value.shape == state[name].shape
        }
        variables = Variables(params, {**state, **known}, variables.constants)
    needed = sae.shapes()
    return jax.tree.map_with_path(_as_needed, needed, variables)


def _as_needed(path: Any, needed: Any, array: Any) -> Any:
    if array.shape != needed.shape:
        raise ValueError(
            f"start has {jax.tree_util.keystr(path)} of shape {array.shape}, this SAE "
            f"needs {needed.shape}; leave n_features and widths as they were."
        )
    return array.astype(needed.dtype)


def _named(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {site: rows_of(site, array) for site, array in arrays.items()}


def _rows_of_one(batch: Any) -> Any:
    return _named(batch) if isinstance(batch, Mapping) else rows_of(ONLY, batch)
