"""Dictionaries whose features are the values of known attributes.

Makelov, Lange, Nanda 2024, arXiv:2405.08366. Of rows x of prompts p, with attributes a
whose values v(p) are known,

    mean dictionary   u[a, v] = mean of x over {p : a(p) = v}  -  mean of x
    MSE dictionary    u = argmin sum ||x - b - sum_a u[a, a(p)]||^2, with bias b

    x_hat(p) = mean of x + sum_a u[a, a(p)]

Where attributes are independent both have one limit. Where they are not, the mean
dictionary gives to each what belongs to the others as well; the paper advises the
second.

Differs: least squares leave open what is moved from all values of an attribute into the
bias; here each attribute's features sum to 0 over the rows that they were fitted on, so
that the bias is the mean of x, as in the mean dictionary. A value that no row has is 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Values = Mapping[str, Int[np.ndarray, " N"]]


class Decomposed(NamedTuple):
    """Rows as sums over features, in the activations' own units.

    `x_hat = strengths @ directions + bias`, whatever made them.
    """

    strengths: Float[np.ndarray, "N F"]
    directions: Float[np.ndarray, "F D"]
    bias: Float[np.ndarray, "#N D"]

    @property
    def x_hat(self) -> Float[np.ndarray, "N D"]:
        """The reconstruction."""
        return self.strengths @ self.directions + self.bias


class Supervised(NamedTuple):
    """A dictionary of attributes' values.

    Attributes:
      sizes: how many values each attribute has, in the order of the features.
      directions: the features.
      mean: of the rows that it was fitted on.
    """

    sizes: dict[str, int]
    directions: Float[np.ndarray, "F D"]
    mean: Float[np.ndarray, " D"]

    def __call__(self, values: Values) -> Decomposed:
        """The rows that prompts of these values should have."""
        on = indicators(values, self.sizes)
        return Decomposed(on, self.directions, self.mean[None])

    def of(self, attribute: str) -> Float[np.ndarray, "V D"]:
        """The features of one attribute."""
        start = 0
        for name, size in self.sizes.items():
            if name == attribute:
                return self.directions[start : start + size]
            start += size
        raise ValueError(f"{attribute!r} is none of {', '.join(self.sizes)}.")


def indicators(values: Values, sizes: Mapping[str, int]) -> Float[np.ndarray, "N F"]:
    """A column for each value of each attribute, 1 where a row has it."""
    blocks = [np.eye(size)[values[name]] for name, size in sizes.items()]
    return np.concatenate(blocks, 1)


def by_means(
    rows: Float[np.ndarray, "N D"], values: Values, sizes: Mapping[str, int]
) -> Supervised:
    """The mean dictionary."""
    x = rows.astype(np.float64)
    on, mean = indicators(values, sizes), x.mean(0)
    counts = on.sum(0)[:, None]
    sums = on.T @ (x - mean)
    return Supervised(dict(sizes), sums / np.maximum(counts, 1), mean)


def by_least_squares(
    rows: Float[np.ndarray, "N D"], values: Values, sizes: Mapping[str, int]
) -> Supervised:
    """The MSE dictionary."""
    x = rows.astype(np.float64)
    on, mean = indicators(values, sizes), x.mean(0)
    share = on.mean(0)
    # Centred, the columns of an attribute are bound to each other; the solution of
    # least norm is one of many that fit alike, and is moved to the one that we name.
    found = np.linalg.lstsq(on - share, x - mean, rcond=1e-9)[0]
    start = 0
    for size in sizes.values():
        part = slice(start, start + size)
        found[part] -= share[part] @ found[part]
        found[part][share[part] == 0] = 0
        start += size
    return Supervised(dict(sizes), found, mean)


def fvu(x: Float[np.ndarray, "N D"], x_hat: Float[np.ndarray, "N D"]) -> float:
    """The fraction of the variance of rows that is not explained."""
    x = x.astype(np.float64)
    return float(np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum())
