"""Worlds of planted features: rows that are sparse sums of known directions.

`x = (on * strength) @ directions + noise`, with unit directions drawn at random and
strengths uniform from 0.5 to 1.5. Worlds differ in which features are on together:

    equal         each is on as often as any other, independent of them
    zipf          the one of rank r as often as r^-exponent says, independent
    correlated    groups, whose features tend to be on in the same rows
    hierarchical  parents with children; a child is on only where its parent is
    noisy         as equal, with Gaussian noise on the rows

In all of them a row has `l0` features on average. One function draws from any: feature
j is called where `z_j < Phi^-1(chance_j)`, with `z_j = sqrt(c) g_group(j) + sqrt(1 - c)
e_j` of standard normal g and e, and is on where it and its parent are called. So one
compiled program serves all worlds.

A model's loss is planted as well, for rules that read its gradient: the cross-entropy
of a softmax that mixes all features at random, for labels drawn from that softmax.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float

WEAKEST, STRONGEST = 0.5, 1.5
MEAN_SQUARE = (WEAKEST**2 + WEAKEST * STRONGEST + STRONGEST**2) / 3  # of a strength
CLASSES = 16  # of the planted softmax; chosen, untested


@dataclass(frozen=True)
class Planted:
    """What is planted."""

    width: Annotated[int, "width of the rows"] = 32
    features: Annotated[int, "true features"] = 64
    l0: Annotated[float, "mean number of true features in a row"] = 3.0
    exponent: Annotated[float, "zipf: how fast frequencies fall with the rank"] = 0.7
    group: Annotated[int, "correlated: features in a group"] = 4
    correlation: Annotated[
        float, "correlated: correlation of the normal variables behind a group"
    ] = 0.7
    children: Annotated[int, "hierarchical: children of each parent"] = 3
    share: Annotated[
        float, "hierarchical: how often a child is on where its parent is"
    ] = 0.3
    noise: Annotated[
        float, "noisy: norm of the noise over that of the rest, root mean squares"
    ] = 0.3

    def faults(self) -> Iterator[str]:
        """What cannot be planted; names are those of the settings."""
        low = {"width": 1, "features": 2, "group": 1, "children": 1}
        for name, least in low.items():
            if getattr(self, name) < least:
                yield f"{name}={getattr(self, name)} must be at least {least}."
        for name, most in {"correlation": 1, "share": 1}.items():
            if not 0 <= getattr(self, name) <= most:
                yield f"{name}={getattr(self, name)} must be from 0 to {most}."
        for name in ("exponent", "noise"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must not be negative."
        if not 0 < self.l0 <= self.features:
            yield f"l0={self.l0} must be above 0 and at most features={self.features}."


class World(NamedTuple):
    """One world; features in the order of `directions`.

    Attributes:
      directions: unit rows.
      chance: how often each is called.
      group: 1 at the groups that features are in; those of one share a g.
      correlation: c, of those of one group.
      parent: 1 at the parents of features; one without is its own.
      noise: standard deviation of the noise in each dimension.
      readout: what the planted softmax makes of x.
    """

    directions: Float[Array, "N D"]
    chance: Float[Array, " N"]
    group: Float[Array, "G N"]
    correlation: Float[Array, ""]
    parent: Float[Array, "N N"]
    noise: Float[Array, ""]
    readout: Float[Array, "C D"]


class Rows(NamedTuple):
    """Rows and the true codes that they were made of."""

    x: Float[Array, "B D"]
    codes: Float[Array, "B N"]


class Kind(NamedTuple):
    """What a world sets: chances, and what else is not as in `equal`."""

    chance: np.ndarray
    correlation: float = 0.0
    parent: np.ndarray | None = None
    noise: float = 0.0


def equal(p: Planted) -> Kind:
    """All alike."""
    return Kind(np.full(p.features, p.l0 / p.features))


def zipf(p: Planted) -> Kind:
    """The first is the most frequent."""
    weights = np.arange(1, p.features + 1) ** -p.exponent
    return Kind(p.l0 * weights / weights.sum())


def correlated(p: Planted) -> Kind:
    """Groups of neighbours."""
    return equal(p)._replace(correlation=p.correlation)


def hierarchical(p: Planted) -> Kind:
    """Parents first, then their children; the rest are alone, as often as parents."""
    n_parents = p.features // (1 + p.children)
    n_children = n_parents * p.children
    parent = np.arange(p.features)
    parent[n_parents : n_parents + n_children] = np.arange(n_children) // p.children
    has_none = parent == np.arange(p.features)
    often = p.l0 / np.where(has_none, 1, p.share).sum()
    return Kind(np.where(has_none, often, p.share), parent=parent)


def noisy(p: Planted) -> Kind:
    """The directions are nearly orthogonal: squared norms of a row's parts add up."""
    square = p.l0 * MEAN_SQUARE
    return equal(p)._replace(noise=p.noise * float(np.sqrt(square / p.width)))


WORLDS: dict[str, Callable[[Planted], Kind]] = {
    "equal": equal,
    "zipf": zipf,
    "correlated": correlated,
    "hierarchical": hierarchical,
    "noisy": noisy,
}


def faults(name: str, planted: Planted) -> Iterator[str]:
    """Why this world cannot be."""
    most = float(WORLDS[name](planted).chance.max())
    if most > 1:
        yield (
            f"l0={planted.l0} asks of the most frequent feature of the world {name} "
            f"to be on in {most:.2f} of the rows; take a smaller one, more features, "
            f"or frequencies that are less uneven."
        )


def make(name: str, planted: Planted, key: Array) -> World:
    """The world of a name; the key decides its directions and its model."""
    kind = WORLDS[name](planted)
    n = planted.features
    key_directions, key_mix = jax.random.split(key)
    directions = jax.random.normal(key_directions, (n, planted.width))
    directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
    mix = jax.random.normal(key_mix, (CLASSES, n))
    return World(
        directions=directions,
        chance=jnp.asarray(kind.chance, jnp.float32),
        group=one_hot(np.arange(n) // planted.group),
        correlation=jnp.float32(kind.correlation),
        parent=one_hot(np.arange(n) if kind.parent is None else kind.parent, n),
        noise=jnp.float32(kind.noise),
        readout=mix @ directions,
    )


def one_hot(where: np.ndarray, n: int | None = None) -> Float[Array, "M N"]:
    """A column for each entry, with its 1 in the row that the entry says."""
    rows = jnp.arange(where.max() + 1 if n is None else n)
    return (rows[:, None] == where).astype(jnp.float32)


def frequencies(world: World) -> Float[Array, " N"]:
    """How often each feature is on."""
    of_parent = world.chance @ world.parent
    return world.chance * jnp.where(jnp.diag(world.parent) > 0, 1, of_parent)


def draw(world: World, key: Array, n_rows: int) -> Rows:
    """Rows of a world."""
    key_on, key_strength, key_noise = jax.random.split(key, 3)
    on = which(world, key_on, n_rows)
    strength = jax.random.uniform(
        key_strength, on.shape, minval=WEAKEST, maxval=STRONGEST
    )
    codes = jnp.where(on, strength, 0)
    x = codes @ world.directions
    noise = jax.random.normal(key_noise, x.shape)
    return Rows(x + world.noise * noise, codes)


def which(world: World, key: Array, n_rows: int) -> Bool[Array, "B N"]:
    """Which features are on."""
    key_shared, key_own = jax.random.split(key)
    n_groups, n = world.group.shape
    # By products with zeros and ones: an index into what is drawn makes XLA draw it
    # again for each of its uses.
    shared = jax.random.normal(key_shared, (n_rows, n_groups)) @ world.group
    own = jax.random.normal(key_own, (n_rows, n))
    c = world.correlation
    called = jnp.sqrt(c) * shared + jnp.sqrt(1 - c) * own < ndtri(world.chance)
    return called & (called @ world.parent > 0)


def gradients(world: World, key: Array, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """The gradient of each row's planted loss with respect to that row."""
    labels = jax.random.categorical(key, x @ world.readout.T)

    def loss(x: Array) -> Array:
        logs = jax.nn.log_softmax(x @ world.readout.T)
        return -jnp.take_along_axis(logs, labels[:, None], 1).sum()

    return jax.grad(loss)(x)
