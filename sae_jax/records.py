"""What a rule is given by the package, and what it gives back."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from sae_jax import products
from sae_jax.codes import Codes

Params = dict[str, Array]
State = dict[str, Array]


class Weights(NamedTuple):
    """The four arrays of an SAE as its products use them.

    Row f of both matrices belongs to feature f.
    """

    W_enc: Float[Array, "F D_in"]
    b_enc: Float[Array, " F"]
    W_dec: Float[Array, "F D_out"]
    b_dec: Float[Array, " D_out"]


class Inputs(NamedTuple):
    """What a rule may look at.

    Attributes:
      x: rows after input treatment, `[B, D_in]`.
      encoder: the encoder product; `encoder.pre` are the pre-activations `[B, F]`.
      weights: the four arrays, read-only.
      target: what is to be reconstructed; `x` itself unless transcoding.
      grad_x: gradient of the model's loss with respect to `x`; None where none is
        given, which is possible outside of training only.
      mask: which rows are valid, or None for all.
      key: consumed by rules that draw random numbers, else None.
      step: training step, counted from 0.
    """

    x: Float[Array, "B D_in"]
    encoder: products.Encoder
    weights: Weights
    target: Float[Array, "B D_out"]
    grad_x: Float[Array, "B D_in"] | None
    mask: Bool[Array, " B"] | None
    key: Array | None
    step: Array | int

    @property
    def pre(self) -> Float[Array, "B F"]:
        """The pre-activations."""
        return self.encoder.pre

    @property
    def x_centred(self) -> Float[Array, "B D_in"]:
        """The rows that the encoder multiplies: `x`, less `b_dec` if so configured."""
        return self.encoder.x - self.encoder.b_pre


class Penalty(NamedTuple):
    """A loss term of the rule's own: `coef * mean over valid rows of per_row`."""

    coef: Array | float
    per_row: Float[Array, " B"]


class Encoded(NamedTuple):
    """Codes, the rule's state after these rows, and the rule's own loss terms."""

    codes: Codes
    state: State
    penalties: dict[str, Penalty]


class Reconstructions(NamedTuple):
    """R reconstructions to be scored, the last of them the SAE's output."""

    x_hats: list[Float[Array, "B D_out"]]
    coefficients: list[float]
