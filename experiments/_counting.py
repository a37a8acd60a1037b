"""Language models that count: the baselines of `train_lm`; not an experiment."""

import numpy as np


def fit_unigram(tokens: np.ndarray, vocab_size: int):
    """Next-token losses under token frequencies, each count raised by one."""
    counts = np.bincount(tokens, minlength=vocab_size) + 1.0
    log_p = np.log(counts / counts.sum())
    return lambda rows: -log_p[rows[:, 1:]]


def fit_bigram(tokens: np.ndarray, validation: np.ndarray, vocab_size: int):
    """Bigrams smoothed towards the unigram: p = (n_ab + m p_b) / (n_a + m).

    m, the weight of the unigram, is the best of a grid on the validation part.
    """
    pairs = np.bincount(
        tokens[:-1].astype(np.int64) * vocab_size + tokens[1:],
        minlength=vocab_size * vocab_size,
    )
    firsts = np.bincount(tokens[:-1], minlength=vocab_size)
    counts = np.bincount(tokens, minlength=vocab_size) + 1.0
    p = counts / counts.sum()

    def losses(rows: np.ndarray, mix: float) -> np.ndarray:
        a, b = rows[:, :-1].astype(np.int64), rows[:, 1:]
        together = pairs[a * vocab_size + b]
        return -np.log((together + mix * p[b]) / (firsts[a] + mix))

    grid = [2.0**i for i in range(-2, 13)]
    mix = min(grid, key=lambda m: losses(validation, m).mean())
    return lambda rows: losses(rows, mix), mix
