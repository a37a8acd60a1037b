"""The training step: `step(state, batch) -> (state, metrics)`, pure, compiled once."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypedDict

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sae_jax import checks, codes, losses
from sae_jax.architecture import DType
from sae_jax.contract import Params
from sae_jax.losses import AuxK
from sae_jax.model import SAE
from sae_jax.training.knob import CONSTANT, Knob
from sae_jax.training.optim import DecoderNorm, project, unit_rows, waiting
from sae_jax.variables import Forward, Variables


class Batch(TypedDict, total=False):
    """Rows to train on; only `x` is always there.

    Attributes:
      x: activations `[B, D_in]`.
      target: what a transcoder aims at, `[B, D_out]`.
      grad: gradient of the model's loss with respect to `x`, for rules that need it.
      mask: bool `[B]`, true for the rows that count.
    """

    x: Array
    target: Array
    grad: Array
    mask: Array


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: how many steps were taken.
      variables: parameters, the rule's state, constants.
      opt_state: the optimiser's memory.
      steps_idle: for each feature, steps since it was last active.
      control: factor on the knob, for steering towards a target L0.
      key: base key; a step's key is this one folded with the step.
    """

    step: Any
    variables: Any
    opt_state: Any
    steps_idle: Any
    control: Any
    key: Any


Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(
    sae: SAE,
    optimiser: optax.GradientTransformation,
    key: Array,
    *,
    variables: Variables | None = None,
    sample: Array | None = None,
    target_sample: Array | None = None,
) -> TrainState:
    """The state before the first step; the key is consumed.

    Pass `variables` to start from an SAE that exists, or the samples that `SAE.init`
    asks for.
    """
    key_init, key_steps = jax.random.split(key)
    if variables is None:
        variables = sae.init(key_init, sample=sample, target_sample=target_sample)
    else:
        variables = jax.tree.map(jnp.copy, variables)  # these stay the caller's
    variables, opt_state = _apart((variables, optimiser.init(variables.params)))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=opt_state,
        steps_idle=jnp.zeros(sae.n_features, jnp.int32),
        control=jnp.ones((), jnp.float32),
        key=key_steps,
    )


def _apart(arrays: Any) -> Any:
    """The same arrays, none of which stands in two places.

    The step reuses the buffers of its state, so none may be shared.
    """
    leaves, treedef = jax.tree.flatten(arrays)
    seen: set[int] = set()
    for i, leaf in enumerate(leaves):
        leaves[i] = jnp.copy(leaf) if id(leaf) in seen else leaf
        seen.add(id(leaf))
    return jax.tree.unflatten(treedef, leaves)


def make_step(
    sae: SAE,
    optimiser: optax.GradientTransformation,
    *,
    aux: AuxK | Literal["default"] | None = "default",
    decoder_norm: DecoderNorm = "after",
    knob: Knob = CONSTANT,
    loss_dtypes: Mapping[str, DType] = MappingProxyType({}),
    jit: bool = True,
) -> Step:
    """Builds the training step of an SAE.

    Loss: `sum_r coefficient_r * mse(x_hat_r, target)`, plus the rule's own terms, plus
    `AuxK`. Gradients of decoder rows lose their part along the row, the optimiser (with
    its clipping) takes its step, rows are divided by their norms.

    Args:
      sae: what is trained.
      optimiser: an optax chain, such as `optim.adam(3e-4)`.
      aux: auxiliary loss for dead features; "default": on if the rule's record says so.
      decoder_norm: when decoder rows return to norm 1. "after" the optimiser's step;
        "before" it, the order of the Top-AFA authors' code, which leaves rows off by
        one step, for replication; "free": never, and gradients are not projected.
      knob: schedule on the rule's knob.
      loss_dtypes: type in which a loss term is taken, by name (`mse`, `aux`, the rule's
        own); otherwise that of the parameters. For replication: the Top-AFA authors'
        code rounds some terms to float32 even in a float64 run.
      jit: compile, and let the step reuse the buffers of the state that it is given.
    """
    fault = checks.value_fault("decoder_norm", decoder_norm, DecoderNorm)
    checks.raise_all(filter(None, [fault]))
    sae = knob.prepare(sae)
    if aux == "default":
        aux = AuxK() if sae.bound.rule.aux_k else None
    if not isinstance(aux, AuxK | None):
        raise ValueError(f"aux={aux!r} must be an AuxK(...), None or 'default'.")

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        checks.raise_all(
            checks.unknown("entry of a batch", name, Batch.__annotations__)
            for name in set(batch) - set(Batch.__annotations__)
        )
        if "x" not in batch:
            raise ValueError("A batch needs 'x', activations [rows, d_in].")
        turned = knob.value(sae, state.step, state.control)
        mask = batch.get("mask")
        one = jnp.int32(1) if mask is None else mask.any().astype(jnp.int32)

        def loss_fn(params: Params, some_dead: bool) -> Any:
            variables = state.variables._replace(params=params)
            out = sae.forward(
                variables,
                batch["x"],
                target=batch.get("target"),
                grad_x=batch.get("grad"),
                mask=mask,
                key=jax.random.fold_in(state.key, state.step),
                step=state.step,
                train=True,
                knob=turned,
            )
            fired = codes.fired(out.codes, mask)
            steps_idle = jnp.where(fired, 0, state.steps_idle + one)
            terms = loss_terms(
                out, mask, steps_idle if some_dead else None, aux, dtypes=loss_dtypes
            )
            seen = {f"loss_{name}": value for name, value in terms.items()}
            seen["nmse"] = nmse(out, mask)
            seen["l0"] = losses.mean_rows(codes.l0(out.codes).astype(jnp.float32), mask)
            return sum(terms.values()), (out.state, steps_idle, seen)

        def gradients(params: Params, some_dead: bool = True) -> Any:
            return jax.value_and_grad(loss_fn, has_aux=True)(params, some_dead)

        params = state.variables.params
        if aux is None:
            found = gradients(params)
        else:
            # Decided outside the gradient: inside it, the branch without dead features
            # would still add zeros to each gradient.
            some_dead = (state.steps_idle + one >= aux.dead_after).any()
            alive = functools.partial(gradients, some_dead=False)
            found = jax.lax.cond(some_dead, gradients, alive, params)
        (loss, (rule_state, steps_idle, seen)), grads = found

        grad_norm = optax.tree.norm(grads)
        if decoder_norm != "free":
            grads = project(grads, params)
        grads = waiting(grads, grad_norm)
        if decoder_norm == "before":
            params = unit_rows(params)
        updates, opt_state = optimiser.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        if decoder_norm == "after":
            params = unit_rows(params)
        metrics = {
            "step": state.step,
            "loss": loss,
            **seen,
            "dead": dead(steps_idle, aux).sum(),
            "grad_norm": grad_norm,
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        if turned is not None:
            metrics["knob"] = turned
        state = TrainState(
            step=state.step + 1,
            variables=Variables(params, rule_state, state.variables.constants),
            opt_state=opt_state,
            steps_idle=steps_idle,
            control=knob.steer(sae, state.control, seen["l0"]),
            key=state.key,
        )
        return state, metrics

    return jax.jit(step, donate_argnums=0) if jit else step


def dead(steps_idle: Array, aux: AuxK | None) -> Array:
    """Which features count as dead."""
    return steps_idle >= (AuxK() if aux is None else aux).dead_after


def loss_terms(
    out: Forward,
    mask: Array | None,
    steps_idle: Array | None,
    aux: AuxK | None,
    *,
    dtypes: Mapping[str, DType] = MappingProxyType({}),
) -> Metrics:
    """The terms whose sum is the loss, each with its coefficient in it.

    `steps_idle` None says that no feature can be dead.
    """
    assert out.target is not None  # training has one, or forward would have said so
    known = {"mse", "aux", *out.penalties}
    checks.raise_all(
        checks.unknown("loss term", name, known) for name in set(dtypes) - known
    )

    def cast(name: str, array: Array) -> Array:
        return array.astype(dtypes.get(name, array.dtype))

    target = cast("mse", out.target)
    scored = zip(out.coefficients, out.x_hats, strict=True)
    errors = [c * losses.mse(cast("mse", x), target, mask) for c, x in scored]
    terms: Metrics = {"mse": functools.reduce(jnp.add, errors)}
    for name, (coef, per_row) in out.penalties.items():
        terms[name] = coef * losses.mean_rows(cast(name, per_row), mask)
    if aux is not None:
        residual = cast("aux", out.target) - cast("aux", out.x_hats[-1])
        terms["aux"] = jnp.zeros((), residual.dtype)
        if steps_idle is not None:
            idle, W_dec = dead(steps_idle, aux), out.weights.W_dec
            terms["aux"] = losses.aux_k(aux, out.encoder, idle, W_dec, residual, mask)
    return terms


def nmse(out: Forward, mask: Array | None) -> Array:
    """Squared error of the output over the spread of the batch around its mean.

    NaN where there is no spread, as in a batch of one row.
    """
    assert out.target is not None
    centre = losses.mean_rows(out.target, mask)[None]
    spread = losses.mse(centre, out.target, mask)
    error = losses.mse(out.x_hats[-1], out.target, mask)
    return jnp.where(spread > 0, error / jnp.where(spread > 0, spread, 1), jnp.nan)
