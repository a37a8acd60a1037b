"""SAEs trained side by side: alike in all but seed, learning rate and knob.

One compiled program takes a step of them all, on the same rows. Their arrays have one
more axis in front, which is spread over the mesh's `member` axis where there is one.
Some of them are computed at once, by `jax.vmap`; passes follow one another, in place.
Small SAEs fill a GPU at once. On a CPU one after the other is a little faster for most
rules: what belongs to one then stays in the cache (`--experiment=bench_ensemble`).
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import mesh
from sae_jax.model import SAE
from sae_jax.training.knob import Turn
from sae_jax.training.recipe import Own, Recipe
from sae_jax.training.window import gathered

# A program is made for the largest budget (k) of its SAEs, and a step takes as long as
# for that one: with k = 256 four times as long as with 8. So budgets stay this near.
BUDGETS = 2.0


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Some SAEs, `alike` and trained by one recipe.

    Attributes:
      saes: the SAEs.
      recipe: how they are trained.
      lrs: learning rates of their own; None: that of the recipe.
      at_once: how many are computed together; divides their number.
    """

    saes: tuple[SAE, ...]
    recipe: Recipe
    lrs: tuple[float | None, ...]
    at_once: int = 1

    @property
    def lead(self) -> tuple[int, ...]:
        """The axis in front of every array; none where one SAE is alone."""
        n = len(self.saes)
        return () if n == 1 else (n,)

    @property
    def n_features(self) -> int:
        """Size of their dictionaries."""
        return self.saes[0].n_features

    @property
    def sae(self) -> SAE:
        """An SAE whose shapes do for each of them."""
        prepared = [self.recipe.knob.prepare(sae) for sae in self.saes]
        top = max(sae.bound.top for sae in prepared)
        return self.saes[0] if len({*self.saes}) == 1 else prepared[0].up_to(top)

    def own(self) -> Own:
        """What each has to itself; nothing where that is the same for all."""
        turn = lr = None
        if len({*self.saes}) > 1:
            prepared = [self.recipe.knob.prepare(sae).bound for sae in self.saes]
            values = [bound.hp[bound.rule.knob] for bound in prepared]
            turn = Turn(self._array(values), self._array([b.top for b in prepared]))
        if {*self.lrs} != {None}:
            rates = [self.recipe.lr if lr is None else lr for lr in self.lrs]
            lr = self._array(rates)
        return Own(lr, turn)

    def _array(self, values: Sequence[float]) -> Any:
        def shaped(values: Any) -> Any:
            return values.reshape(self.lead)

        given = jnp.asarray(values, float)
        return mesh.made(shaped, self.n_features, given, lead=len(self.lead))

    def stacked(self, trees: Sequence[Any]) -> Any:
        """The arrays of all, from those of each."""
        if not self.lead:
            return trees[0]

        def stack(trees: Sequence[Any]) -> Any:
            def together(*leaves: Any) -> Any:
                return jnp.stack(leaves)

            return jax.tree.map(together, *trees)

        given = tuple(trees)
        return mesh.made(stack, self.n_features, given, lead=len(self.lead))

    def of(self, tree: Any, i: int) -> Any:
        """The arrays of SAE i."""
        if not self.lead:
            return tree
        return jax.tree.map(lambda leaf: leaf[i], tree)

    def make_step(self, axis: str | None = None) -> Callable[..., Any]:
        """`(own, state, window, batch) -> (state, window)` of all; see `gathered`."""

        def step(own: Own, state: Any, window: Any, batch: Any) -> Any:
            plain = self.recipe.make_step(self.sae, own=own, axis=axis, jit=False)
            return gathered(plain)(state, window, batch)

        return step if not self.lead else self._of_all(step)

    def _of_all(self, one: Callable[..., Any]) -> Callable[..., Any]:
        at_once, n_passes = self.at_once, len(self.saes) // self.at_once

        def together(own: Own, held: Any, batch: Any) -> Any:
            if at_once == 1:
                alone = jax.tree.map(lambda leaf: leaf[0], (own, held))
                found = one(alone[0], *alone[1], batch)
                return jax.tree.map(lambda leaf: leaf[None], found)
            spread = mesh.MEMBER if mesh.spread() else None
            mapped = jax.vmap(
                one,
                in_axes=(0, 0, 0, None),
                axis_name=mesh.BESIDE,
                spmd_axis_name=spread,
            )
            return mapped(own, *held, batch)

        def step(own: Own, state: Any, window: Any, batch: Any) -> Any:
            given = own, (state, window)
            own, held = jax.tree.map(
                lambda leaf: leaf.reshape(at_once, n_passes, *leaf.shape[1:]), given
            )

            def one_pass(i: Any, held: Any) -> Any:
                mine, now = jax.tree.map(lambda leaf: leaf[:, i], (own, held))
                found = together(mine, now, batch)
                return jax.tree.map(lambda a, b: a.at[:, i].set(b), held, found)

            held = jax.lax.fori_loop(0, n_passes, one_pass, held)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), held)

        return step


def alike(sae: SAE) -> Hashable:
    """SAEs for which this is the same differ in nothing but a knob that is traced."""
    rule, fields = sae.bound.rule, vars(sae).items()
    free = {rule.knob} & {*rule.traced}
    return (
        rule.name,
        tuple((name, v) for name, v in sae.bound.values if name not in free),
        tuple((name, v) for name, v in fields if name != "rule"),
        str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), sae.shapes())),
    )


def near(saes: Sequence[SAE]) -> Iterator[list[int]]:
    """Which of SAEs that are `alike` one program shall train: of budgets, near ones."""
    rule = saes[0].bound.rule
    if rule.budget != rule.knob:
        yield list(range(len(saes)))
        return
    group: list[int] = []
    for i in sorted(range(len(saes)), key=lambda i: saes[i].bound.top):
        if group and saes[i].bound.top > BUDGETS * saes[group[0]].bound.top:
            yield group
            group = []
        group.append(i)
    yield group
