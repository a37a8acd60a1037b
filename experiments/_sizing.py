"""What a training step on a mesh holds, sends and computes, by formulas.

Not an experiment. All sizes are of one device, in bytes. `tests/on_devices` compares
them with what XLA says of compiled steps. Letters: b rows and f features of a device,
D the width, K slots of sparse codes.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from sae_jax import codes, largest, mesh
from sae_jax.mesh import DATA, FEATURE
from sae_jax.model import SAE
from sae_jax.training.recipe import Recipe
from sae_jax.training.step import init_state

FLOAT = 4  # bytes of parameters, sums and indices


class Split(NamedTuple):
    """Over how many devices rows and features are spread."""

    data: int
    feature: int

    def __str__(self) -> str:
        return f"{self.data}x{self.feature}"


class Exchange(NamedTuple):
    """One collective of a step.

    Attributes:
      what: what is exchanged.
      kind: the operation, by XLA's name.
      axis: of the mesh.
      n: devices along that axis.
      result: bytes of the result on each device.
    """

    what: str
    kind: str
    axis: str
    n: int
    result: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, in a ring: a sum goes around twice."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.result * (self.n - 1) / self.n


class Form(NamedTuple):
    """What a rule's codes are on a mesh.

    Attributes:
      slots: slots of a row where codes are sparse, 0 where they are dense.
      sums: numbers of each row that are summed over features: L0 and loss terms.
      code_bytes: of one value.
    """

    slots: int
    sums: int
    code_bytes: int


@cache
def form(sae: SAE) -> Form:
    """Asks the rule itself, by tracing it on a mesh of no devices."""
    one = AbstractMesh((1, 1), (DATA, FEATURE), axis_types=(AxisType.Auto,) * 2)
    rows = jax.ShapeDtypeStruct((2, sae.d_in), jnp.float32)
    found = []

    def encode(variables: Any, x: Any) -> Any:
        key = jax.random.key(0)
        out = sae.forward(variables, x, grad_x=x, key=key, train=True)
        values = codes.entries(out.codes)
        sparse = isinstance(out.codes, codes.Sparse)
        slots = values.shape[1] if sparse else 0
        sums = 0 if sparse else 1 + len(out.penalties)
        found.append(Form(slots, sums, values.dtype.itemsize))
        return values

    with jax.sharding.use_abstract_mesh(one):
        jax.eval_shape(encode, sae.shapes(), rows)
    return found[0]


@dataclass(frozen=True)
class Step:
    """A training step of an SAE on a mesh."""

    sae: SAE
    batch: int
    recipe: Recipe
    split: Split

    @property
    def b(self) -> int:
        """Rows of a device that are there at once."""
        return self.batch // self.split.data // self.recipe.accumulate

    @property
    def f(self) -> int:
        """Features of a device."""
        return self.sae.n_features // self.split.feature

    @property
    def matrix(self) -> int:
        """Bytes of a device's part of the encoder or decoder."""
        return FLOAT * self.f * self.sae.d_in

    @property
    def codes(self) -> int:
        """Bytes of a device's pre-activations."""
        return FLOAT * self.b * self.f

    @property
    def with_aux(self) -> bool:
        """Whether dead features have a loss of their own."""
        by_rule = self.sae.bound.rule.aux_k
        return {"rule": by_rule, "always": True, "never": False}[self.recipe.use_aux]

    def state(self) -> dict[str, int]:
        """What stays from step to step: exact, read off the state's own shapes."""
        state = shapes(self.sae, self.recipe)

        def held(tree: Any) -> int:
            where = mesh.specs(tree, self.sae.n_features)
            each = zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True)
            return sum(
                size(leaf) // (self.split.feature if spec == mesh.FEATURES else 1)
                for leaf, spec in each
            )

        parameters = held(state.variables.params)
        moments = held(state.opt_state)
        rest = held(state) - parameters - moments
        return {"parameters": parameters, "moments": moments, "counters": rest}

    def rows(self) -> int:
        """The device's rows of a batch."""
        return FLOAT * self.batch // self.split.data * self.sae.d_in

    def temporaries(self) -> dict[str, int]:
        """What a step holds for a while; gradients and codes take the same place.

        Gradients: of both matrices, and again while sums over rows are on their way; in
        pieces of a batch a third time. Codes: pre-activations; where few slots are
        searched for in blocks, once more; dense rules keep codes and their gradient as
        well. A loss for dead features has gradients of its own, and pre-activations,
        of which it searches a part. Exchange: two arrays [b D], and candidates of all
        devices.
        """
        slots = form(self.sae).slots
        gradients = 6 if self.recipe.accumulate > 1 else 4
        in_blocks = slots * largest.BLOCK * 8 <= self.f
        kept = (2 if in_blocks else 1) if slots else 3
        if self.with_aux:
            gradients, kept = 2 * gradients, kept + 2
        exchange = 2 * FLOAT * self.b * self.sae.d_in
        exchange += 2 * FLOAT * self.b * min(slots, self.f) * self.split.feature
        return {
            "gradients": gradients * self.matrix,
            "codes": kept * self.codes,
            "exchange": exchange,
        }

    def exchanges(self) -> list[Exchange]:
        """Everything that devices tell each other in a step without dead features.

        But for scalars, and for what a rule sums beyond its loss: the bisection of a
        cut (Top-AFA, BatchTopK) takes some 40 numbers a row or a batch.
        """
        n, D, pieces = self.split, self.sae.d_in, self.recipe.accumulate
        slots, sums, code_bytes = form(self.sae)
        found = []
        if n.feature > 1:
            at_once = [("x_hat", "all-reduce", FLOAT * self.b * D)]
            if slots:
                each = FLOAT * self.b * min(slots, self.f) * n.feature
                at_once += [("candidates", "all-gather", 2 * each)]
                values = code_bytes * self.b * slots
                at_once += [("gradients of codes", "all-reduce", values)]
            else:
                at_once += [("sums of rows", "all-reduce", sums * FLOAT * self.b)]
            rule, centre = self.sae.bound.rule, self.sae.centre
            if rule.centres if centre is None else centre:
                at_once += [("gradient of b_dec", "all-reduce", FLOAT * D)]
            found += [
                Exchange(what, kind, FEATURE, n.feature, pieces * result)
                for what, kind, result in at_once
            ]
        if n.data > 1:
            of_all = [
                ("gradients of matrices", 2 * self.matrix),
                ("gradients of biases", FLOAT * (self.f + D)),
                ("who fired", pieces * self.f),
                ("mean row", pieces * FLOAT * D),
            ]
            found += [
                Exchange(what, "all-reduce", DATA, n.data, result)
                for what, result in of_all
            ]
        return found


@cache
def shapes(sae: SAE, recipe: Recipe) -> Any:
    """The shapes of a state of training."""

    def start(variables: Any) -> Any:
        key = jax.random.key(0)
        return init_state(sae, recipe.optimiser(), key, variables=variables)

    return jax.eval_shape(start, sae.shapes())


def size(leaf: Any) -> int:
    """Bytes of an array; a random key has two numbers of four."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 2 * FLOAT * prod(leaf.shape)
    return leaf.dtype.itemsize * prod(leaf.shape)
