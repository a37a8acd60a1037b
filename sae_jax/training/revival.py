"""The auxiliary loss for dead features, added after the gradients of the other terms.

In most steps no feature is dead. Inside the gradient of all terms a branch would still
add zeros to each matrix in them; around that gradient it would hold all other terms
twice. That the residual is a constant to this term (`AuxK.detach`) lets it come after
them. Where it is not, the term is one of the others.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from sae_jax import losses, mesh
from sae_jax.architecture import DType
from sae_jax.contract import Params, State
from sae_jax.losses import AuxK
from sae_jax.model import SAE
from sae_jax.training import pieces
from sae_jax.training.sums import grown
from sae_jax.training.terms import revived, unexplained
from sae_jax.variables import Forward, Variables

# On a CPU, where more than k features are dead, and of batches that it divides.
ROWS_AT_ONCE = 256

Seen = dict[str, Array]


class Left(NamedTuple):
    """What the other terms of a piece leave for this one.

    Attributes:
      rule_state: of the rule, before the piece.
      features: which are dead or underused.
      rows: `x` after its treatment, `residual`, and `mask` where there is one.
    """

    rule_state: State
    features: Bool[Array, " F"]
    rows: dict[str, Array]


class Revival(NamedTuple):
    """The term of one step.

    Attributes:
      sae, aux: what is trained, and how the term is taken.
      variables: those before the step.
      turned: the rule's knob, by name, if it moves.
      underused: which features the rule calls so, if it does.
      dtypes: types in which terms are taken.
    """

    sae: SAE
    aux: AuxK
    variables: Variables
    turned: dict[str, Array]
    underused: Bool[Array, " F"] | None
    dtypes: Mapping[str, DType]

    def left(
        self, out: Forward, rule_state: State, steps_idle: Array, mask: Array | None
    ) -> Left:
        """What a pass leaves."""
        rows = {"x": out.encoder.x, "residual": unexplained(out, self.dtypes)}
        if mask is not None:
            rows["mask"] = mask
        return Left(rule_state, revived(steps_idle, self.underused, self.aux), rows)

    def added(
        self, seen: Seen, grads: Params, params: Params, left: Left, share: Array
    ) -> tuple[Seen, Params]:
        """Losses and gradients of a piece, with this term in them.

        Loops of no turn, not branches: XLA would copy the gradients in each branch.
        """
        rows, dead = left.rows, left.features
        n_rows = len(rows["x"])
        k = min(self.aux.k, dead.size)
        decode_all = partial(losses.decode_all, k=k)
        decode_strongest = partial(losses.decode_strongest, k=k)
        weight = losses.aux_weight(self.aux, dead, rows["residual"], rows.get("mask"))
        weight = weight * share.astype(weight.dtype)
        whole = mesh.spread() or jax.default_backend() != "cpu"
        n = 1 if whole or n_rows % ROWS_AT_ONCE else n_rows // ROWS_AT_ONCE
        shares = pieces.shares_of(rows, n, None)

        def plus(i: Array, sums: Any, decode: Callable, rows: Any, weight: Any) -> Any:
            # What is the same in all turns, XLA would compute before a loop of none.
            now = left._replace(features=dead & (i >= 0), rows=rows)
            return self._plus(sums, params, decode, now, weight)

        def with_all(i: Array, sums: Any) -> Any:
            return plus(i, sums, decode_all, rows, weight)

        def with_strongest(i: Array, sums: Any) -> Any:
            own = weight * shares[i].astype(weight.dtype)
            return plus(i, sums, decode_strongest, pieces.piece(rows, n, i), own)

        kind = losses.how_many(dead, k)
        sums = seen["loss_aux"], grads
        sums = jax.lax.fori_loop(0, jnp.where(kind == 1, 1, 0), with_all, sums)
        sums = jax.lax.fori_loop(0, jnp.where(kind == 2, n, 0), with_strongest, sums)
        value, grads = sums
        return {**seen, "loss_aux": value, "loss": seen["loss"] + value}, grads

    def _plus(
        self, sums: Any, params: Params, decode: Callable, left: Left, weight: Array
    ) -> tuple[Array, Params]:
        """Sums of losses and of gradients, with those of some rows."""
        total, grads = sums
        residual, mask = left.rows["residual"], left.rows.get("mask")

        def loss(params: Params) -> tuple[Array, Array]:
            variables = self.variables._replace(params=params, state=left.rule_state)
            weights = self.sae.weights(variables, **self.turned)
            encoder = self.sae.encoder(weights, left.rows["x"])
            e_hat = decode(encoder, left.features, weights.W_dec)
            value = weight * losses.mse(e_hat.astype(residual.dtype), residual, mask)
            return value, value

        grads, value = grown(jax.grad(loss, has_aux=True), grads, params)
        return total + value, grads
