"""What can be written at a site: functions of the value that stood there.

    lm.run(tokens, write={"resid_post.3": add(4.0 * direction)})

An edit is a pytree: new arrays of the same shape do not compile again. Both sources
take the same edits.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool


@struct.dataclass
class Edit:
    """`new = fn(old, *args)`, at the positions of `where` [B, T] or everywhere."""

    fn: Callable[..., Array] = struct.field(pytree_node=False)
    args: tuple[Any, ...] = ()
    where: Any = None

    def __call__(self, old: Array) -> Array:
        """What stands at the site after the edit."""
        new = jnp.asarray(self.fn(old, *self.args), old.dtype)
        new = jnp.broadcast_to(new, old.shape)
        return new if self.where is None else jnp.where(self.where[..., None], new, old)


def replace(value: Array, *, where: Bool[Array, "B T"] | None = None) -> Edit:
    """Puts `value` there, broadcast to the site."""
    return Edit(_second, (value,), where)


def add(value: Array, *, where: Bool[Array, "B T"] | None = None) -> Edit:
    """Adds `value`, for example a steering vector."""
    return Edit(_plus, (value,), where)


def scale(by: Array | float, *, where: Bool[Array, "B T"] | None = None) -> Edit:
    """Multiplies with `by`."""
    return Edit(_times, (jnp.asarray(by),), where)


def ablate(*, where: Bool[Array, "B T"] | None = None) -> Edit:
    """Sets to zero."""
    return Edit(jnp.zeros_like, (), where)


def apply(fn: Callable[..., Array], *args, where: Bool[Array, "B T"] | None = None):
    """Any function of the old value and of `args`, which may change between calls.

    `fn` itself is part of the compiled program: pass the same function, not a new
    lambda, each time.
    """
    return Edit(fn, args, where)


def _second(old, value):
    return value


def _plus(old, value):
    return old + value


def _times(old, by):
    return old * by
