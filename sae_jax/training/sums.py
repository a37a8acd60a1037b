"""Sums of gradients that grow by products, some features at a time.

The gradient of a matrix [F, D] that encodes or decodes is a product over rows, [F, B]
times [B, D]. Of a piece of a batch, `jax.grad` makes all of it, and only then can it be
added to the sum over the pieces before: another [F, D] in memory, since on CPUs XLA
lets no product end in a sum. So there the products in which gradients end are taken out
of their traced program, and made for some features at a time, each added where it
belongs.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend.core import Var, jaxpr_as_fun
from jaxtyping import Array

from sae_jax import mesh
from sae_jax.piecewise import in_place

AT_ONCE = 512  # features; they stay in the cache


@flax.struct.dataclass
class Product:
    """The product of two matrices over one axis of each."""

    left: Any
    right: Any
    over: tuple[int, int] = flax.struct.field(pytree_node=False)
    options: dict[str, Any] = flax.struct.field(pytree_node=False)

    @property
    def turned(self) -> "Product":
        """Its transpose."""
        return Product(self.right, self.left, self.over[::-1], self.options)


def grown(gradients: Callable, total: Any, *args: Any) -> tuple[Any, Any]:
    """`total + grads, rest` where `gradients(*args)` gives `grads, rest`."""
    if mesh.spread() or jax.default_backend() != "cpu":
        grads, rest = gradients(*args)
        return jax.tree.map(jnp.add, total, grads), rest
    program, (_, rest) = jax.make_jaxpr(gradients, return_shape=True)(*args)
    outputs = program.jaxpr.outvars
    n = len(jax.tree.leaves(total))
    made = {var: eqn for eqn in program.jaxpr.eqns for var in eqn.outvars}
    terms = [_terms(var, made) for var in outputs[:n]]
    wanted, tree = jax.tree.flatten((terms, outputs[n:]))
    names = program.jaxpr.debug_info._replace(result_paths=None)
    jaxpr = program.jaxpr.replace(outvars=wanted, debug_info=names)
    found = jaxpr_as_fun(program.replace(jaxpr=jaxpr))(*jax.tree.leaves(args))
    terms, others = jax.tree.unflatten(tree, found)
    leaves, tree = jax.tree.flatten(total)
    sums = zip(leaves, terms, strict=True)
    leaves = [functools.reduce(_plus, own, leaf) for leaf, own in sums]
    rest = jax.tree.unflatten(jax.tree.structure(rest), others)
    return jax.tree.unflatten(tree, leaves), rest


def _terms(var: Any, made: dict[Var, Any]) -> list[Any]:
    """What a gradient is the sum of: products where it can be told, or itself."""
    eqn = made.get(var) if isinstance(var, Var) else None
    if eqn is None:
        return [var]
    if eqn.primitive is jax.lax.dot_general_p:
        given = dict(eqn.params)
        over, _ = given.pop("dimension_numbers")
        if all(v.aval.ndim == 2 for v in (*eqn.invars, *eqn.outvars)):
            (left, a), (right, b) = (
                _as_it_is(v, axes[0], made)
                for v, axes in zip(eqn.invars, over, strict=True)
            )
            return [Product(left, right, (a, b), given)]
    if eqn.primitive.name == "add_any":
        return [term for part in eqn.invars for term in _terms(part, made)]
    if eqn.primitive is jax.lax.transpose_p:
        terms = _terms(eqn.invars[0], made)
        if all(isinstance(term, Product) for term in terms):
            return [term.turned for term in terms]
    return [var]


def _as_it_is(var: Any, axis: int, made: dict[Var, Any]) -> tuple[Any, int]:
    """A matrix and one of its axes, or those before it was transposed.

    Of a product that stands alone XLA takes transposed operands as they are; one that
    goes into a loop it would copy.
    """
    eqn = made.get(var)
    if eqn is not None and eqn.primitive is jax.lax.transpose_p:
        return eqn.invars[0], 1 - axis
    return var, axis


def _plus(total: Array, term: Any) -> Array:
    if not isinstance(term, Product):
        return total + term
    over, right, options = term.over, term.right, term.options
    numbers = ((over[:1], over[1:]), ((), ()))

    def plus_some(rows: Array, start: Array | int) -> Array:
        left = jax.lax.dynamic_slice_in_dim(term.left, start, len(rows), 1 - over[0])
        return rows + jax.lax.dot_general(left, right, numbers, **options)

    return in_place(plus_some, AT_ONCE, total)
