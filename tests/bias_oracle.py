"""Group bias adaptation as its paper tells it, with a buffer of pre-activations.

In NumPy, feature by feature, without a line of the package.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def target(feature: int, n_features: int, hp: dict[str, Any]) -> float:
    """The frequency that a feature's group may have."""
    group, last = feature * hp["groups"] // n_features, hp["groups"] - 1
    if last == 0:
        return hp["highest"]
    return hp["highest"] * (hp["lowest"] / hp["highest"]) ** (group / last)


def adapted(y: Array, bias: Array, hp: dict[str, Any]) -> Array:
    """The next biases, from all pre-activations of a buffer `[N, F]`."""
    n_features = len(bias)
    r = [max(0, column.max()) for column in y.T]
    found = bias.copy()
    for m in range(n_features):
        frequency = (y[:, m] > 0).mean()
        if frequency > target(m, n_features, hp):
            found[m] = max(bias[m] - hp["lower"] * r[m], -1)
        elif frequency < hp["dead_below"]:
            mine = [
                r[j]
                for j in range(n_features)
                if j * hp["groups"] // n_features == m * hp["groups"] // n_features
            ]
            alive = [value for value in mine if value > 0]
            mean = sum(alive) / len(alive) if alive else 0
            found[m] = min(bias[m] + hp["lift"] * mean, 0)
    return found


def trajectory(
    batches: Sequence[Array], W: Array, bias: Array, hp: dict[str, Any]
) -> Iterator[tuple[Array, float]]:
    """Biases, and the length that they are fractions of, after each batch."""
    unit, buffer, lengths = 1.0, [], []
    for t, x in enumerate(batches, start=1):
        buffer.append(x @ W.T + unit * bias)
        lengths.append([np.sqrt(row @ row) for row in x])
        if t % hp["every"] == 0:
            unit = float(np.mean(np.concatenate(lengths)))
            bias = adapted(np.concatenate(buffer) / unit, bias, hp)
            old = max(len(buffer) - (hp["windows"] - 1) * hp["every"], 0)
            buffer, lengths = buffer[old:], lengths[old:]
        yield bias, unit
