"""Slow float64 versions of the principled evaluation, without a line of the package."""

import itertools

import numpy as np


def mean_dictionary(rows, labels):
    """`labels`: of each attribute the value of each row. Value by value, row by row."""
    rows = rows.astype(np.float64)
    mean = sum(rows) / len(rows)
    found = {}
    for name, values in labels.items():
        for v in set(values.tolist()):
            mine = [row for row, w in zip(rows, values, strict=True) if w == v]
            found[name, v] = sum(mine) / len(mine) - mean
    return found, mean


def least_squares_fit(rows, labels):
    """The fitted rows of the MSE dictionary, by a projection on its columns."""
    columns = [np.ones(len(rows))]
    for values in labels.values():
        columns += [(values == v).astype(float) for v in sorted(set(values.tolist()))]
    A = np.stack(columns, 1)
    return A @ np.linalg.pinv(A) @ rows.astype(np.float64)


def best_exchange(a_s, a_t, f_s, f_t, directions, k):
    """The least distance over all sets of at most k features, exchanged wholly."""
    best = np.linalg.norm(a_s - a_t)
    for size in range(1, k + 1):
        for chosen in itertools.combinations(range(len(directions)), size):
            edited = a_s.copy()
            for j in chosen:
                edited = edited - f_s[j] * directions[j] + f_t[j] * directions[j]
            best = min(best, np.linalg.norm(edited - a_t))
    return best


def greedy(a_s, a_t, f_s, f_t, directions, k):
    """Feature by feature, each distance from nothing but the definition."""
    edited, chosen, distances = a_s.copy(), [], [np.linalg.norm(a_s - a_t)]
    for _ in range(k):
        tried = {
            j: np.linalg.norm(edited + (f_t[j] - f_s[j]) * directions[j] - a_t)
            for j in range(len(directions))
            if j not in chosen and f_t[j] != f_s[j]
        }
        if not tried or min(tried.values()) >= distances[-1]:
            distances.append(distances[-1])
            continue
        j = min(tried, key=tried.get)
        chosen.append(j)
        edited = edited + (f_t[j] - f_s[j]) * directions[j]
        distances.append(tried[j])
    return chosen, distances, edited


def weight(f, directions, j):
    """The share of feature j in the reconstruction less its bias."""
    whole = sum(f[i] * directions[i] for i in range(len(f)))
    return f[j] * (directions[j] @ whole) / (whole @ whole)


def f1(active, holds):
    """Counted row by row."""
    both = sum(1 for a, h in zip(active, holds, strict=True) if a and h)
    total = sum(map(bool, active)) + sum(map(bool, holds))
    return 2 * both / total if total else 0.0


def best_union(active, values, size, most):
    """Greedily, value by value."""
    taken, best = set(), 0.0
    while len(taken) < min(most, size - 1):
        tried = {
            v: f1(active, np.isin(values, [*taken, v]))
            for v in range(size)
            if v not in taken
        }
        v = max(tried, key=tried.get)
        if tried[v] <= best:
            break
        taken.add(v)
        best = tried[v]
    return best, taken
