"""Meshes of devices: rows of a batch spread over `data`, features over `feature`.

A third axis, `member`, is for SAEs that are trained side by side: each device has some.

Code is written for whole arrays, and XLA splits it: a rule says nothing of devices.
Where XLA would bring all codes [B, F] to every device (largest scores, cuts, sparse
codes), a function says what one device does with its own part, in `on_each`, and what
devices tell each other, in the functions below it. Without a mesh those change nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

MEMBER, DATA, FEATURE = AXES = "member", "data", "feature"
BESIDE = "beside"  # of `jax.vmap`, over SAEs that are computed at once
ROWS, FEATURES = PartitionSpec(DATA), PartitionSpec(FEATURE)
CODES = PartitionSpec(DATA, FEATURE)  # [B, F]
WHOLE = PartitionSpec()


def make(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of devices, such as `make({"data": 4, "feature": 2})`.

    Enter it with `jax.set_mesh`: what is traced inside is spread over it.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(
            f"mesh axis {unknown[0]!r} is unknown; there are {DATA!r}, over which rows "
            f"of a batch are spread, {FEATURE!r}, over which features are, and "
            f"{MEMBER!r}, over which SAEs are that are trained side by side."
        )
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    there, wanted = jax.device_count(), math.prod(shape)
    if min(shape) < 1 or there != wanted:
        given = ", ".join(f"{axis}:{size}" for axis, size in sizes.items())
        raise ValueError(
            f"a mesh of {given} needs {wanted} devices; there are {there}. Sizes "
            f"multiply to the number of devices."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse(text: Sequence[str]) -> dict[str, int]:
    """The sizes of a mesh as they are typed: `("data:4", "feature:2")`."""
    sizes = {}
    for part in text:
        name, _, size = part.partition(":")
        if not size.isdecimal():
            raise ValueError(f"mesh: {part!r} is not axis:size, as in data:4,feature:2")
        sizes[name] = int(size)
    return sizes


def misfits(sizes: Mapping[str, int], rows: int, n_features: int) -> Iterator[str]:
    """What cannot be spread evenly: rows that are there at once, and features."""
    n_data, n_feature = sizes.get(DATA, 1), sizes.get(FEATURE, 1)
    if rows % n_data:
        yield f"{rows} rows at once cannot be spread evenly over mesh data:{n_data}."
    if n_features % n_feature:
        yield (
            f"{n_features} features cannot be spread evenly over mesh "
            f"feature:{n_feature}."
        )


def spread() -> bool:
    """Whether what is traced here are whole arrays, spread over a mesh."""
    return FEATURE in jax.sharding.get_abstract_mesh().auto_axes


def on_each(part: Callable, inputs: Any, outputs: Any) -> Callable:
    """A function of whole arrays, from what each device does with its parts.

    Without a mesh, and on a device's own part already, it is `part` itself.
    """
    if not spread():
        return part
    return jax.shard_map(part, in_specs=inputs, out_specs=outputs, check_vma=False)


def inside(axis: str) -> bool:
    """Whether what is traced here is one device's part along an axis."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def size(axis: str) -> int:
    """Over how many devices an axis is spread, seen from one of them."""
    return jax.lax.axis_size(axis) if inside(axis) else 1


def total(x: Array, *axes: str) -> Array:
    """The sum over the devices of axes."""
    there = [axis for axis in axes if inside(axis)]
    return jax.lax.psum(x, there) if there else x


def most(x: Array, axis: str) -> Array:
    """The largest over the devices of an axis."""
    return jax.lax.pmax(x, axis) if inside(axis) else x


def least(x: Array, axis: str) -> Array:
    """The smallest over the devices of an axis."""
    return jax.lax.pmin(x, axis) if inside(axis) else x


def together(x: Array, axis: str, *, dimension: int) -> Array:
    """The parts of all devices of an axis, one after the other."""
    if not inside(axis):
        return x
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)


def before(x: Array, axis: str) -> Array:
    """The sum over the devices that come earlier on an axis."""
    if not inside(axis):
        return jnp.zeros_like(x)
    each = jax.lax.all_gather(x, axis)
    earlier = jnp.arange(each.shape[0]) < jax.lax.axis_index(axis)
    return jnp.where(earlier.reshape(-1, *(1,) * x.ndim), each, 0).sum(0)


def for_any(found: Array) -> Array:
    """Whether it is so for any of the SAEs that are computed at once.

    A branch that depends on one of them alone, all would have to take both ways.
    """
    try:
        return jax.lax.pmax(found, BESIDE)
    except NameError:  # there is one
        return found


def own(indices: Array, n: int, axis: str) -> tuple[Array, Array | bool]:
    """Indices into this device's n of an axis, and which of them are its own.

    Those of other devices become 0.
    """
    if not inside(axis):
        return indices, True
    indices = indices - n * jax.lax.axis_index(axis)
    mine = (indices >= 0) & (indices < n)
    return jnp.where(mine, indices, 0), mine


def specs(tree: Any, n_features: int, lead: int = 0) -> Any:
    """How the arrays of an SAE, its optimiser and its counters are spread.

    By features where the first axis is as long as the dictionary; `b_dec` never is.
    Arrays of several SAEs have a `lead` of one axis more.
    """
    front = (MEMBER,) * lead

    def of(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        rest = leaf.shape[lead:]
        by_feature = rest[:1] == (n_features,) and name != "b_dec"
        return PartitionSpec(*front, *(FEATURES if by_feature else WHOLE))

    return jax.tree_util.tree_map_with_path(of, tree)


def constrained(tree: Any, n_features: int) -> Any:
    """The same tree, spread as `specs` says where there is a mesh."""
    if not spread():
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(tree, n_features))


def made(make_tree: Callable, n_features: int, *args: Any, lead: int = 0) -> Any:
    """`make_tree(*args)`; on a mesh no device ever holds more than its part.

    Where the result is of several SAEs, `lead` says how many axes more it has.
    """
    if not spread():
        return make_tree(*args)
    args = jax.tree.map(_put, args, shardings(args, n_features))
    return in_parts(make_tree, n_features, *args, lead=lead)(*args)


def _put(leaf: Array, where: NamedSharding) -> Array:
    """The array on the mesh; keys cannot be put on other processes' devices."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else jax.device_put(leaf, where)


def in_parts(
    make_tree: Callable, n_features: int, *args: Any, lead: int = 0
) -> jax.stages.Wrapped:
    """A function whose results are spread over the mesh as `specs` says."""
    found = shardings(jax.eval_shape(make_tree, *args), n_features, lead)
    given = shardings(args, n_features)
    return jax.jit(make_tree, in_shardings=given, out_shardings=found)


def shardings(tree: Any, n_features: int, lead: int = 0) -> Any:
    """The `specs` on the mesh that was entered."""
    mesh = jax.sharding.get_mesh()
    found = specs(tree, n_features, lead)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), found)


def like(shapes: Any, n_features: int, lead: int = 0) -> Any:
    """The same shapes, with the places where their arrays will be."""

    def placed(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, shapes, shardings(shapes, n_features, lead))
