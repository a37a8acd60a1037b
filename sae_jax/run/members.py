"""The SAEs that are trained on the same batches: their start, their compiled steps."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sae_jax import mesh
from sae_jax.model import SAE
from sae_jax.run.devices import ONE_DEVICE, OneDevice
from sae_jax.training.recipe import Recipe
from sae_jax.training.step import Batch, TrainState, init_state
from sae_jax.training.window import Window, empty
from sae_jax.variables import Variables

Rows = Mapping[str, Array]


@runtime_checkable
class Stream(Protocol):
    """Batches of activations `{site: [B, D]}`; see `sae_jax.activations`.

    One that was opened with a share (`sae_jax.share`) gives its rows of each batch;
    `batch` is the size of the whole.
    """

    batch: int

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        ...

    def batches(self, start: int = 0, position: Any = None) -> Iterator[Any]:
        """Batches from number `start` on."""
        ...

    def position(self, t: int) -> Any:
        """What leads back to batch `t`."""
        ...


class Member(NamedTuple):
    """One of the SAEs.

    Attributes:
      sae: its description.
      site: what it reads.
      target: the site that a transcoder writes.
      seed: decides its start and whatever is random in its training.
      start: arrays to start from; by default fresh ones.
    """

    sae: SAE
    site: str
    target: str | None = None
    seed: int = 0
    start: Variables | None = None

    def batch(self, rows: Rows) -> Batch:
        """Its part of a batch."""
        if self.target is None:
            return {"x": rows[self.site]}
        return {"x": rows[self.site], "target": rows[self.target]}

    def faults(self, widths: Mapping[str, int]) -> Iterator[str]:
        """What does not fit the sites that there are."""
        if (self.target is None) == self.sae.is_transcoder:
            yield "a transcoder, and only a transcoder, has a target site."
        if "grad_x" in self.sae.bound.rule.needs:
            yield "its rule needs gradients of the model's loss; no stream has any."
        wanted = [(self.site, self.sae.d_in), (self.target, self.sae.width_out)]
        for site, width in wanted:
            if site is None:
                continue
            if site not in widths:
                yield f"no site {site!r}; there are {', '.join(widths)}."
            elif widths[site] != width:
                yield f"{site} is {widths[site]} wide, the SAE is made for {width}."


class Held(NamedTuple):
    """What a member has in memory: the state of training, and the window of metrics."""

    state: TrainState
    window: Window


def fresh(member: Member, recipe: Recipe, rows: Rows) -> Held:
    """The start, estimated from the first batch where it is not random."""
    batch = member.batch(rows)
    state = init_state(
        member.sae,
        recipe.optimiser(),
        jax.random.key(member.seed),
        variables=member.start,
        sample=batch["x"],
        target_sample=batch.get("target"),
    )
    step = recipe.make_step(member.sae, jit=False)
    n_features = member.sae.n_features
    window = mesh.made(lambda: empty(step, state, batch), n_features)
    return Held(state, window)


def shapes(
    members: Mapping[str, Member],
    recipe: Recipe,
    stream: Stream,
    devices: OneDevice = ONE_DEVICE,
) -> dict[str, Held]:
    """The shapes of `fresh`, without any data."""
    rows = {
        site: jax.ShapeDtypeStruct((stream.batch, width), jnp.float32)
        for site, width in stream.widths.items()
    }
    found = {}
    for name, member in members.items():
        held = jax.eval_shape(lambda r, m=member: fresh(m, recipe, r), rows)
        found[name] = devices.like(held, member.sae.n_features)
    return found


def compile_steps(
    members: Mapping[str, Member],
    recipe: Recipe,
    held: Mapping[str, Held],
    rows: Rows,
    devices: OneDevice = ONE_DEVICE,
) -> dict[str, Any]:
    """Each member's step, compiled before the first is run; alike ones only once."""
    programs: dict[Any, Any] = {}
    steps = {}
    for name, member in members.items():
        batch = member.batch(devices.rows(rows))
        key = member.sae, member.target
        if key not in programs:
            step = devices.program(member.sae, recipe)
            programs[key] = step.lower(*held[name], batch).compile()
        steps[name] = programs[key]
    return steps
