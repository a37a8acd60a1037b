"""What a trained rule does to a single row, in words that other libraries share.

With `pre` the pre-activations, which include the encoder's bias:

    positive   relu(pre)
    largest    relu(pre) on the k largest of the row, 0 elsewhere; settings: k
    above      relu(pre) where pre > threshold, 0 elsewhere; arrays: threshold [F]
    gate       relu(exp(r_mag) * (pre - b_enc) + b_mag) where pre > 0, 0 elsewhere;
               arrays: r_mag [F], b_mag [F]
    pursuit    matching pursuit of x - b_dec by the decoder's rows; settings:
               max_iterations, residual_threshold, stop_on_duplicate_support

A rule's record says which of them it is, or why it is none; formats of other libraries
are written from what it says.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["positive", "largest", "above", "gate", "pursuit"]


class Counterpart(NamedTuple):
    """One of these kinds with the arrays and settings that it needs."""

    kind: Kind
    arrays: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
