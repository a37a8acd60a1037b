"""Training on a planted world, at the sparsity of its truth."""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import _recovery, _worlds
from experiments._worlds import World
from sae_jax import RULES, SAE, registry, rules
from sae_jax.binding import BoundRule, bind
from sae_jax.codes import to_dense
from sae_jax.training.knob import Turn
from sae_jax.training.recipe import SHARED, Own, Recipe
from sae_jax.training.step import TrainState, init_state
from sae_jax.variables import Variables

How = Literal["budget", "steered", "searched", "as given"]
FARTHEST = math.log(4)  # that the search moves a knob at once


class Plan(NamedTuple):
    """What is trained, and how it comes to the sparsity of the data."""

    sae: SAE
    recipe: Recipe
    how: How


def all_rules() -> tuple[str, ...]:
    """Every registered rule with its defaults; its example where it has none."""
    return tuple(_plainest(name) for name in RULES)


def _plainest(name: str) -> str:
    try:
        rules.parse(name)
    except ValueError:  # an argument is needed
        return registry.format_spec(name, dict(RULES[name].example))
    return name


def plan(spec: str, width: int, n_features: int, l0: float, recipe: Recipe) -> Plan:
    """Gives a rule its sparsity: by its budget if it has one, else by steering.

    A rule whose knob nothing can steer is trained as it is given.
    """
    bound = rules.parse(spec)
    if bound.rule.budget:
        return Plan(SAE(width, n_features, with_budget(bound, l0)), recipe, "budget")
    sae = SAE(width, n_features, bound)
    knob = dataclasses.replace(recipe.knob, target_l0=l0)
    try:
        knob.prepare(sae)
    except ValueError:
        return Plan(sae, recipe, "as given")
    return Plan(sae, dataclasses.replace(recipe, knob=knob), "steered")


def with_budget(bound: BoundRule, l0: float) -> BoundRule:
    """The rule with a budget of so many features a row; a whole number if it must."""
    budget = str(bound.rule.budget)
    hint = bound.rule.hyperparameters()[budget][0]
    if (typing.get_args(hint) or (hint,))[0] is int:
        l0 = max(1, round(l0))
    return bind(bound.rule, {**bound.hp, budget: l0})


class Keys(NamedTuple):
    """What a seed decides: the world, its batches, the rows held out, the SAE."""

    world: Array
    batches: Array
    held_out: Array
    sae: Array


def keys(seed: int) -> Keys:
    """The same for all rules and worlds."""
    return Keys(*jax.random.split(jax.random.key(seed), 4))


class HeldOut(NamedTuple):
    """Rows to evaluate on, their true codes, and the gradients of the planted loss."""

    x: Array
    codes: Array
    grad: Array


def held_out(world: World, keys: Keys, n_rows: int) -> HeldOut:
    """Rows that no batch has."""
    rows = _draw(world, keys.held_out, n_rows)
    key_labels = jax.random.fold_in(keys.held_out, 1)
    return HeldOut(*rows, _gradients(world, key_labels, rows.x))


_draw = jax.jit(_worlds.draw, static_argnums=2)
_gradients = jax.jit(_worlds.gradients)


class Trained(NamedTuple):
    """What training leaves; `knob` is where it came to stand, if it was turned."""

    state: TrainState
    knob: float | None


def train(
    plan: Plan, world: World, keys: Keys, batch: int, knob: float | None = None
) -> Trained:
    """Takes all steps; batch t depends on the world, its key, and t alone.

    With a `knob` it stays there, and nothing is steered.
    """
    state = init_state(plan.sae, plan.recipe.optimiser(), keys.sae)
    sae = plan.recipe.knob.prepare(plan.sae)
    recipe, own = plan.recipe, SHARED
    if knob is not None:
        fixed = dataclasses.replace(recipe.knob, target_l0=None)
        recipe = dataclasses.replace(recipe, knob=fixed)
        own = Own(turn=Turn(jnp.float32(knob), jnp.float32(sae.bound.top)))
    state = _steps(sae, recipe, batch, own, world, keys.batches, state)
    if knob is None and plan.how == "steered":
        reached = recipe.knob.reached(plan.sae, state.step, state.control).bound
        knob = reached.hp[reached.rule.knob]
    return Trained(state, knob)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _steps(
    sae: SAE,
    recipe: Recipe,
    batch: int,
    own: Own,
    world: World,
    key: Array,
    state: TrainState,
) -> TrainState:
    step = recipe.make_step(sae, own=own, jit=False)

    def one(_: Any, state: TrainState) -> TrainState:
        key_rows, key_labels = jax.random.split(jax.random.fold_in(key, state.step))
        x = _worlds.draw(world, key_rows, batch).x
        rows = {"x": x}
        if reads_gradients(sae):
            rows["grad"] = _worlds.gradients(world, key_labels, x)
        return step(state, rows)[0]

    return jax.lax.fori_loop(0, recipe.steps, one, state)


def reads_gradients(sae: SAE) -> bool:
    """Whether its rule is to see gradients of the planted loss."""
    return "grad_x" in sae.bound.rule.needs


def next_knob(points: Sequence[tuple[float, float]], l0: float, rises: bool) -> float:
    """Where to put the knob for this L0, from the knobs and L0s of trainings before.

    By the secant of log L0 over log knob; by a slope of 1 (or -1, where L0 falls) from
    a single point, or where two of them have the wrong slope, or hardly any.
    """
    logs = [(math.log(knob), math.log(max(found, 0.01))) for knob, found in points]
    at, found = logs[-1]
    slope = 1.0 if rises else -1.0
    for before, found_before in logs[:-1][-1:]:
        if before != at:
            measured = (found - found_before) / (at - before)
            slope = measured if measured * slope > 0.1 else slope
    move = (math.log(l0) - found) / slope
    return math.exp(at + max(-FARTHEST, min(FARTHEST, move)))


def scored(plan: Plan, trained: Trained, world: World, rows: HeldOut) -> dict[str, Any]:
    """What a row of results says of an SAE; `rows` are held out."""
    sae, bound = plan.recipe.knob.prepare(plan.sae), plan.sae.bound
    # The knob is traced: SAEs that differ in it share a compiled program.
    variables = trained.state.variables
    grad = rows.grad if reads_gradients(sae) else None
    out = _passed(sae, variables, rows.x, grad, trained.knob)
    x, codes = np.asarray(rows.x), np.asarray(rows.codes)
    x_hat, learned, W_dec = (np.asarray(array) for array in out)
    if trained.knob is not None:
        bound = bind(bound.rule, {**bound.hp, bound.rule.knob: trained.knob})
    at = int(trained.state.diverged)
    return {
        "spec": bound.spec,
        "how": plan.how,
        "l0": float((learned != 0).sum(1).mean()),
        "true_l0": float((codes != 0).sum(1).mean()),
        "nmse": _recovery.nmse(x, x_hat),
        **_recovery.recovered(np.asarray(world.directions), codes, W_dec, learned),
        "dead": float((learned == 0).all(0).mean()),
        "diverged_in_step": None if at < 0 else at,
    }


@functools.partial(jax.jit, static_argnums=0)
def _passed(
    sae: SAE, variables: Variables, x: Array, grad: Array | None, knob: Any
) -> tuple[Array, ...]:
    """Reconstructions, codes as one array, and decoder rows."""
    turned = {} if knob is None else {sae.bound.rule.knob: knob}
    out = sae.forward(variables, x, grad_x=grad, knob=knob)
    W_dec = sae.weights(variables, **turned).W_dec
    return out.undo(out.x_hats[-1]), to_dense(out.codes), W_dec


def best(
    plan: Plan,
    world: World,
    keys: Keys,
    batch: int,
    rows: HeldOut,
    tries: int,
    near: float,
) -> dict[str, Any]:
    """The scores of the training that came nearest to the true L0.

    If steering ends farther off than `near`, relative to it, the SAE is trained anew
    with a constant knob, at first where steering ended, so many times at most.
    """
    trained = train(plan, world, keys, batch)
    nearest = scores = scored(plan, trained, world, rows)
    points: list[tuple[float, float]] = []
    knob = trained.knob
    while knob and len(points) < tries and distance(nearest) > near:
        trained = train(plan, world, keys, batch, knob)
        scores = scored(plan, trained, world, rows) | {"how": "searched"}
        if distance(scores) < distance(nearest):
            nearest = scores
        points.append((knob, scores["l0"]))
        rises = bool(plan.sae.bound.rule.knob_raises_l0)
        knob = next_knob(points, scores["true_l0"], rises)
    return nearest


def distance(scores: Mapping[str, Any]) -> float:
    """How far L0 is from that of the truth, relative to it."""
    return abs(scores["l0"] - scores["true_l0"]) / scores["true_l0"]
