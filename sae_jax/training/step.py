"""The training step: `step(state, batch) -> (state, metrics)`, pure, compiled once."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypedDict

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sae_jax import checks, codes, losses, mesh
from sae_jax.architecture import DType
from sae_jax.contract import Params
from sae_jax.losses import AuxK
from sae_jax.model import SAE
from sae_jax.training import pieces
from sae_jax.training.knob import CONSTANT, Knob, Turn
from sae_jax.training.optim import DecoderNorm, project, unit_rows, waiting
from sae_jax.training.revival import Revival
from sae_jax.training.terms import dead, errors, loss_terms, nmse, underused
from sae_jax.variables import Variables


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
      diverged: the first step whose loss or gradient was not finite, or -1. It and
        those after it change nothing but `step`.
      key: base key; a step's key is this one folded with the step.
    """

    step: Any
    variables: Any
    opt_state: Any
    steps_idle: Any
    control: Any
    diverged: Any
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

    def start(key: Array, variables: Any, sample: Any, target_sample: Any) -> Any:
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
            diverged=jnp.full((), -1, jnp.int32),
            key=key_steps,
        )

    given = key, variables, sample, target_sample
    return mesh.made(start, sae.n_features, *given)


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
    turn: Turn | None = None,
    accumulate: int = 1,
    axis: str | None = None,
    jit: bool = True,
) -> Step:
    """Builds the training step of an SAE.

    Loss: `sum_r coefficient_r * mse(x_hat_r, target)`, plus the rule's own terms, plus
    `AuxK`. Gradients of decoder rows lose their part along the row, the optimiser (with
    its clipping) takes its step, rows are divided by their norms.

    Args:
      sae: what is trained.
      optimiser: an optax chain, such as `optim.adam(3e-4)`.
      aux: auxiliary loss for dead features, and for those that the rule calls
        underused; "default": on if the rule's record says so.
      decoder_norm: when decoder rows return to norm 1. "after" the optimiser's step;
        "before" it, the order of the Top-AFA authors' code, which leaves rows off by
        one step, for replication; "free": never, and gradients are not projected.
      knob: schedule on the rule's knob.
      turn: where the knob stands, traced, where that is not the SAE's own value.
      loss_dtypes: type in which a loss term is taken, by name (`mse`, `aux`, the rule's
        own); otherwise that of the parameters. For replication: the Top-AFA authors'
        code rounds some terms to float32 even in a float64 run.
      accumulate: take the gradients of so many pieces of each batch one after another,
        so that codes exist for one piece at a time. The same step, unless the rule
        looks over a batch, remembers batches or draws numbers: to it each piece is one.
        A feature that a later piece revives still counts as dead before it.
      axis: name of a `jax.pmap` axis along which the rows of a batch are spread: sums
        over rows go over it. Not for rules that look over a batch or remember it.
      jit: compile, and let the step reuse the buffers of the state that it is given.
    """
    faults = [
        checks.value_fault("decoder_norm", decoder_norm, DecoderNorm),
        pieces.number_fault(accumulate),
    ]
    checks.raise_all(filter(None, faults))
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
        checks.raise_all(filter(None, [pieces.fault(len(batch["x"]), accumulate)]))
        turned = knob.value(sae, state.step, state.control, turn)
        mask = batch.get("mask")
        one = jnp.int32(1)
        if mask is not None:
            one = pieces.anywhere(mask.any(), axis).astype(jnp.int32)

        weak, late = None, None
        if aux is not None:
            weak = underused(sae.bound, state.variables.state, turned)
        if aux is not None and aux.detach:
            turns = {} if turned is None else {sae.bound.rule.knob: turned}
            late = Revival(sae, aux, state.variables, turns, weak, loss_dtypes)

        def piece_loss(params: Params, carried: Any, rows: Batch, i: Array) -> Any:
            rule_state, fired = carried
            mask = rows.get("mask")
            key = jax.random.fold_in(state.key, state.step)
            out = sae.forward(
                state.variables._replace(params=params, state=rule_state),
                rows["x"],
                target=rows.get("target"),
                grad_x=rows.get("grad"),
                mask=mask,
                key=key if accumulate == 1 else jax.random.fold_in(key, i),
                step=state.step,
                train=True,
                knob=turned,
            )
            fired |= pieces.anywhere(codes.fired(out.codes, mask), axis)
            steps_idle = jnp.where(fired, 0, state.steps_idle + one)
            idle: Any = steps_idle
            left = None
            if late is not None:
                idle, left = None, late.left(out, rule_state, steps_idle, mask)
            terms = loss_terms(out, mask, idle, aux, underused=weak, dtypes=loss_dtypes)
            seen = {f"loss_{name}": value for name, value in terms.items()}
            seen["l0"] = losses.mean_rows(codes.l0(out.codes).astype(jnp.float32), mask)
            carried = out.state, fired
            return sum(terms.values()), (carried, seen, errors(out, mask), left)

        params = state.variables.params
        fired = jnp.zeros(sae.n_features, bool)
        found, grads = pieces.value_and_gradients(
            piece_loss,
            accumulate,
            axis,
            params,
            (state.variables.state, fired),
            batch,
            late=None if late is None else late.added,
        )
        seen, (rule_state, fired), of_pieces, shares = found
        steps_idle = jnp.where(fired, 0, state.steps_idle + one)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(seen["loss"]) & jnp.isfinite(grad_norm)
        goes_on = finite & (state.diverged < 0)

        def along_free(grads: Params) -> Params:
            if decoder_norm != "free":
                grads = project(grads, params)
            return waiting(grads, grad_norm)

        # A branch: to choose between arrays, XLA would keep the old beside the new. On
        # a mesh it copies sums over devices that enter one, but not what was made of
        # them; on one device it is the other way round.
        before = mesh.spread()
        start = params
        if decoder_norm == "before":
            start = unit_rows(params, where=goes_on)
        given = start, state.opt_state, along_free(grads) if before else grads

        def updated(params: Params, opt_state: Any, grads: Params) -> Any:
            grads = grads if before else along_free(grads)
            updates, opt_state = optimiser.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(goes_on, n, o), new, old)

        params, opt_state = jax.lax.cond(
            goes_on, updated, lambda params, opt_state, _: (params, opt_state), *given
        )
        if decoder_norm == "after":  # in the branch they would take another matrix
            params = unit_rows(params, where=goes_on)
        metrics = {
            "step": state.step,
            **seen,
            "nmse": nmse(of_pieces, shares),
            "dead": dead(steps_idle, aux).sum(),
            "grad_norm": grad_norm,
            "finite": finite,
            "diverged": jnp.where(
                (state.diverged < 0) & ~finite, state.step, state.diverged
            ),
        }
        if knob.moves:
            metrics["knob"] = turned
        state = TrainState(
            step=state.step + 1,
            variables=Variables(
                params,
                kept(rule_state, state.variables.state),
                state.variables.constants,
            ),
            opt_state=opt_state,
            steps_idle=kept(steps_idle, state.steps_idle),
            control=kept(
                knob.steer(sae, state.control, seen["l0"], turn), state.control
            ),
            diverged=metrics["diverged"],
            key=state.key,
        )
        return mesh.constrained(state, sae.n_features), metrics

    return jax.jit(step, donate_argnums=0) if jit else step
