"""Two ways to mix the rows of a reader's blocks, each of R rows.

Group g is what is drawn between block g + 1 and the block after it, R rows; its order,
like every other here, follows from a key and the number of a block. `held` are the R
rows, or R / 2, that wait for the next block.

neighbours   group g is the second half of block g and the first half of block g + 1,
             so that batch t needs two blocks and nothing older. (The first half of
             block 0 is in no group.)
buffer       the mixing buffer of FAST (Li et al. 2025, arXiv:2506.07691): 2 R rows are
             filled, shuffled, half of them given, R new ones filled in, and so on. A
             row is given after one refill with probability 1/2, after two with 1/4,
             two on average; so those of one long context spread over more groups.
             At the end of the text the other half is given as well.

What is held of the buffer comes from a handful of blocks: log2 R or so, for of each
block half of what is left leaves with every refill. `oldest` finds the first of them
from the keys alone, and a run that resumes reads the text from there on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

Mixed = Literal["neighbours", "buffer"]
# More than any row waits: of 2^k rows one waits so long with a chance of 2^(k - 64).
LONGEST = 64


class Mixing(NamedTuple):
    """One of the ways.

    Attributes:
        oldest: `(key, group, n)`: the first block that a group of n rows takes part of.
        begin: `(rows, key, number)`: what is held after block `number`, of which
            older rows do not matter.
        mix: `(held, rows, key, number)`: group `number` - 1 in its order, and what is
            held then.
        gives_all: whether what is held when the text ends is a last group.
        reach: how many blocks a group may go back.
    """

    oldest: Callable[[Key[Array, ""], int, int], int]
    begin: Callable[..., Any]
    mix: Callable[..., tuple[Any, Any]]
    gives_all: bool
    reach: int


class _Order(NamedTuple):
    """Two random orders per block: of its own rows, and of the group it completes."""

    own: Array
    group: Array


def _order(key: Array, number: Array, n: int) -> _Order:
    own, group = jax.random.split(jax.random.fold_in(key, number))
    return _Order(jax.random.permutation(own, n), jax.random.permutation(group, n))


def _n(rows: Any) -> int:
    return jax.tree.leaves(rows)[0].shape[0]


@jax.jit
def _second_half(rows, key, number):
    """The rows of a block that belong to the group which begins with it."""
    n = _n(rows)
    chosen = _order(key, number, n).own[n // 2 :]
    return jax.tree.map(lambda x: x[chosen], rows)


@jax.jit
def _mix_neighbours(half, rows, key, number):
    """A whole group, in its final order, and the half that is kept for the next."""
    n = _n(rows)
    own, order = _order(key, number, n)

    def group(old, new):
        return jnp.concatenate([old, new[own[: n // 2]]])[order]

    mixed = jax.tree.map(group, half, rows)
    return mixed, jax.tree.map(lambda x: x[own[n // 2 :]], rows)


@partial(jax.jit, static_argnums=2)
def _refill(key: Array, number: Array, n: int) -> Array:
    """The order of the full buffer: what was held, then block `number`."""
    return jax.random.permutation(jax.random.fold_in(key, number), 2 * n)


@jax.jit
def _mix_buffer(held, rows, key, number):
    """Half of the buffer, shuffled, and the other half."""
    n = _n(rows)
    order = _refill(key, number, n)

    def picked(which):
        """Without an array of the whole buffer."""

        def pick(old, new):
            return jnp.where((which < n)[:, None], old[which % n], new[which % n])

        return jax.tree.map(pick, held, rows)

    return picked(order[:n]), picked(order[n:])


def _begin_buffer(rows, key, number):
    """Block 0 fills half of the buffer; later, older rows are gone when it counts."""
    if number == 0:
        return rows
    return _mix_buffer(jax.tree.map(jnp.zeros_like, rows), rows, key, number)[1]


def _oldest_in_buffer(key: Array, group: int, n: int) -> int:
    """Follows the rows that are held after block `group` back to where they entered."""
    slots = np.arange(n)
    for number in range(group, 0, -1):
        before = np.asarray(_refill(key, number, n))[n:][slots]
        slots = before[before < n]
        if not len(slots):
            return number
    return 0


MIXINGS: dict[str, Mixing] = {
    "neighbours": Mixing(
        lambda key, group, n: group, _second_half, _mix_neighbours, False, 2
    ),
    "buffer": Mixing(_oldest_in_buffer, _begin_buffer, _mix_buffer, True, LONGEST),
}
