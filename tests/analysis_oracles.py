"""Slow float64 versions of the analyses, without a line of the package."""

import numpy as np


def least_squares(x, y, *, intercept=False):
    """W and b of NumPy's own solver, on the rows themselves."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    x_mean = x.mean(0) if intercept else np.zeros(x.shape[1])
    y_mean = y.mean(0) if intercept else np.zeros(y.shape[1])
    W = np.linalg.lstsq(x - x_mean, y - y_mean, rcond=1e-9)[0]
    return W, y_mean - x_mean @ W


def r2(y, y_hat):
    """Column by column, and their mean."""
    found = []
    for column, predicted in zip(y.T, y_hat.T, strict=True):
        mean = sum(column) / len(column)
        spread = sum((v - mean) ** 2 for v in column)
        wrong = sum((v - p) ** 2 for v, p in zip(column, predicted, strict=True))
        found.append(1 - wrong / spread)
    return sum(found) / len(found)


def fvu(x, x_hat):
    mean = x.mean(0)
    wrong = sum(((a - b) ** 2).sum() for a, b in zip(x, x_hat, strict=True))
    return wrong / sum(((row - mean) ** 2).sum() for row in x)


def dark_matter(x, x_hat, fitted, *, intercept=False):
    """All scores of rows but those by chance; and the linear error of all rows."""
    x, e = x.astype(np.float64), x.astype(np.float64) - x_hat
    size = np.array([[sum(v * v for v in row)] for row in e])
    W, b = least_squares(x[fitted], e[fitted], intercept=intercept)
    w, c = least_squares(x[fitted], size[fitted], intercept=intercept)
    new, linear = ~fitted, x @ W + b
    whole = fvu(x[new], x_hat[new])
    rest = fvu(x[new], x_hat[new] + linear[new])
    scores = {
        "fvu": whole,
        "fvu_nonlinear": rest,
        "linear_share": 1 - rest / whole,
        "normalised_mse": np.mean((e[new] ** 2).mean(1) / (x[new] ** 2).mean(1)),
        "error_vector_r2": r2(e[new], linear[new]),
        "error_norm_r2": r2(size[new], x[new] @ w + c),
    }
    return scores, linear


def gradient_pursuit(x, atoms, budgets):
    """Row by row, as written in the docstring; dense codes."""
    codes = np.zeros((len(x), len(atoms)))
    for row, w, budget in zip(x, codes, budgets, strict=True):
        for _ in range(budget):
            r = row - w @ atoms
            p = atoms @ r
            support = w != 0
            support[np.argmax(p)] = True
            g = np.where(support, p, 0)
            c = g @ atoms
            step = c @ r / (c @ c) if c @ c > 0 else 0
            w[:] = np.maximum(0, w + step * g)
    return codes


def matching_pursuit(x, atoms, steps):
    """Each step adds one atom by as much as it explains, and moves no other."""
    codes = np.zeros((len(x), len(atoms)))
    for row, w in zip(x, codes, strict=True):
        for _ in range(steps):
            p = atoms @ (row - w @ atoms)
            w[np.argmax(p)] += max(p.max(), 0)
    return codes


def strongest(codes, use, n):
    """For each prompt the set of n features with the highest codes after position 0."""
    found = []
    for prompt, used in zip(codes, use, strict=True):
        peak = {}
        for t in range(1, len(used)):
            for j in np.flatnonzero(prompt[t]) if used[t] else ():
                peak[int(j)] = max(peak.get(int(j), 0), prompt[t, j])
        found.append(set(sorted(peak, key=lambda j: -peak[j])[:n]))
    return found


def erased(x, codes, W_dec, features, factor, use):
    """Edited prompts and how far each of them moves, position by position."""
    new, moved = x.astype(np.float64), []
    for prompt, active, used in zip(new, codes, use, strict=True):
        squares = []
        for t in range(len(used)):
            step = sum((factor - 1) * active[t, j] * W_dec[j] for j in features)
            if used[t] and t > 0:
                prompt[t] += step
                squares.append(np.mean(np.square(step)))
        moved.append(np.mean(squares))
    return new, np.array(moved)
