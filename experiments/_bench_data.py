"""What all systems of `bench` are given: the same rows, and the same first weights."""

from pathlib import Path

import numpy as np

N_BATCHES = 4  # used in turn
PER_ROW = 40  # directions in a row
ZIPF = 0.7
NOISE = 0.05


def write(folder: Path, batch: int, width: int, n_features: int) -> None:
    """Leaves `x.npy [N_BATCHES, B, D]` and `W_dec.npy [F, D]` in a folder.

    Made once and read by every worker: no process counts the memory of making them.
    """
    rows = planted(0, N_BATCHES * batch, width, n_features)
    np.save(folder / "x.npy", rows.reshape(N_BATCHES, batch, width))
    np.save(folder / "W_dec.npy", unit_rows(1, n_features, width))


def planted(seed: int, n_rows: int, width: int, n_directions: int) -> np.ndarray:
    """Rows that are sums of directions, some of which are in most rows.

    `x = sum_i s_i v_{j_i} + noise` over PER_ROW draws of j, which is the direction of
    rank r with a probability in proportion to r^-0.7. Strengths s are exponential of
    mean 1, the noise is Gaussian. So a few features are hot, as with activations of a
    language model: on even data a scatter of gradients never meets a row twice.
    """
    rng = np.random.default_rng(seed)
    directions = unit_rows(seed + 2, n_directions, width)
    chosen = ranks(rng, (n_rows, PER_ROW), n_directions)
    strengths = rng.standard_exponential((n_rows, PER_ROW), dtype=np.float32)
    x = NOISE * rng.standard_normal((n_rows, width), dtype=np.float32)
    for i in range(PER_ROW):
        x += strengths[:, i, None] * directions[chosen[:, i]]
    return x


def ranks(
    rng: np.random.Generator, shape: tuple[int, ...], n_directions: int
) -> np.ndarray:
    """Draws from 0 to n_directions - 1, r with a probability of (r + 1)^-0.7 / sum."""
    weights = np.arange(1, n_directions + 1) ** -ZIPF
    cumulative = np.cumsum(weights / weights.sum())
    drawn = np.searchsorted(cumulative, rng.random(shape))
    return np.minimum(drawn, n_directions - 1)  # where rounding left the sum below 1


def unit_rows(seed: int, n_rows: int, width: int) -> np.ndarray:
    """Gaussian rows divided by their norms."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n_rows, width), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
