"""Members that are trained side by side: who goes with whom, start, compiled steps."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import mesh
from sae_jax.run.devices import ONE_DEVICE, OneDevice
from sae_jax.run.members import Member, Rows, Stream
from sae_jax.training.ensemble import Ensemble, alike, near
from sae_jax.training.recipe import Own, Recipe
from sae_jax.training.step import TrainState, init_state
from sae_jax.training.window import Window, empty


class Held(NamedTuple):
    """What is in memory: the state of training, and the window of metrics."""

    state: TrainState
    window: Window


class Group(NamedTuple):
    """Members that one program trains.

    Attributes:
      names: their names.
      members: the members, in the same order.
      ensemble: how they are trained side by side.
      own: what each has to itself, as the program takes it.
    """

    names: tuple[str, ...]
    members: tuple[Member, ...]
    ensemble: Ensemble
    own: Own

    def fresh(self, rows: Rows) -> Held:
        """The start of all, each as if it were alone."""
        return self.ensemble.stacked(
            [fresh(member, self.ensemble.recipe, rows) for member in self.members]
        )

    @property
    def program(self) -> Hashable:
        """Groups for which this is the same share a program."""
        shape = self.ensemble.lead, jax.tree.structure(self.own)
        return self.ensemble.sae, self.members[0].target, shape


class Groups(tuple[Group, ...]):
    """All members of a run, in groups; what is held is a list, one for each group."""

    def fresh(self, rows: Rows) -> list[Held]:
        """The start, estimated from the first batch where it is not random."""
        return [group.fresh(rows) for group in self]

    def shapes(self, stream: Stream, devices: OneDevice = ONE_DEVICE) -> list[Held]:
        """The shapes of `fresh`, without any data."""
        rows = {
            site: jax.ShapeDtypeStruct((stream.batch, width), jnp.float32)
            for site, width in stream.widths.items()
        }
        return [
            devices.like(
                jax.eval_shape(group.fresh, rows),
                group.ensemble.n_features,
                len(group.ensemble.lead),
            )
            for group in self
        ]

    def compile(
        self, held: Sequence[Held], rows: Rows, devices: OneDevice = ONE_DEVICE
    ) -> list[Any]:
        """Each group's step, before the first is run; alike ones are compiled once."""
        programs: dict[Any, Any] = {}
        for group, (state, window) in zip(self, held, strict=True):
            batch = group.members[0].batch(devices.rows(rows))
            if group.program not in programs:
                step = devices.program(group.ensemble)
                lowered = step.lower(group.own, state, window, batch)
                programs[group.program] = lowered.compile()
        return [programs[group.program] for group in self]

    def step(
        self, steps: Sequence[Any], held: Sequence[Held], rows: Rows, restart: bool
    ) -> list[Held]:
        """One step of all; windows begin anew where that is asked for."""
        found = []
        for group, step, (state, window) in zip(self, steps, held, strict=True):
            window = window.restarted() if restart else window
            batch = group.members[0].batch(rows)
            found.append(Held(*step(group.own, state, window, batch)))
        return found

    def of(self, trees: Sequence[Any], name: str) -> Any:
        """What a member has in what all groups have."""
        for group, tree in zip(self, trees, strict=True):
            if name in group.names:
                return group.ensemble.of(tree, group.names.index(name))
        raise KeyError(name)

    def named(self, held: Sequence[Held]) -> dict[str, Held]:
        """Each group by the name of its first, as in a checkpoint."""
        return {group.names[0]: one for group, one in zip(self, held, strict=True)}

    def listed(self, held: Mapping[str, Held]) -> list[Held]:
        """What `named` was made from."""
        return [held[group.names[0]] for group in self]


def grouped(
    members: Mapping[str, Member], recipe: Recipe, devices: OneDevice = ONE_DEVICE
) -> Groups:
    """Side by side is trained whoever reads the same and is alike."""
    kinds: dict[Hashable, list[str]] = {}
    for name, member in members.items():
        own_start = None if member.start is None else name  # it may have any shape
        kind = alike(member.sae), member.site, member.target, own_start
        kinds.setdefault(kind, []).append(name)

    def found() -> Iterator[Group]:
        for names in kinds.values():
            for group in near([members[name].sae for name in names]):
                chosen = tuple(members[names[i]] for i in group)
                ensemble = Ensemble(
                    tuple(member.sae for member in chosen),
                    recipe,
                    tuple(member.lr for member in chosen),
                    devices.at_once(len(chosen), chosen[0].sae.n_features),
                )
                with devices.entered():
                    own = ensemble.own()
                yield Group(tuple(names[i] for i in group), chosen, ensemble, own)

    return Groups(found())


def fresh(member: Member, recipe: Recipe, rows: Rows) -> Held:
    """The start of one."""
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
