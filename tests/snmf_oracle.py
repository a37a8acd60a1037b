"""Slow float64 version of the factorisation, without a line of the package."""

import numpy as np


def split(a):
    return (np.abs(a) + a) / 2, (np.abs(a) - a) / 2


def step(A, G, n_kept):
    """One iteration in the paper's letters: A [neurons, tokens], G [tokens, K]."""
    K = G.shape[1]
    F = A @ G @ np.linalg.inv(G.T @ G + 1e-6 * np.eye(K))
    for k in range(K):
        weakest = sorted(range(len(F)), key=lambda i: -abs(F[i, k]))[n_kept:]
        F[weakest, k] = 0
    G = G.copy()
    for k in range(K):
        norm = np.sqrt(sum(G[:, k] ** 2))
        if norm > 0:
            G[:, k] /= norm
        F[:, k] *= norm
    (P_up, P_down), (Q_up, Q_down) = split(A.T @ F), split(F.T @ F)
    return F, G * np.sqrt((P_up + G @ Q_down) / (P_down + G @ Q_up + 1e-6))


def error(A, F, G):
    return ((A - F @ G.T) ** 2).sum() / (A**2).sum()


def factorise(A, G, n_kept, steps, patience=10**9, tolerance=1e-4):
    """The best iterate, and the errors of all that were made."""
    errors, best, to_beat, waited = [], None, np.inf, 0
    for _ in range(steps):
        if waited >= patience:
            break
        F, G = step(A, G, n_kept)
        errors.append(error(A, F, G))
        if best is None or errors[-1] < best[0]:
            best = errors[-1], F, G
        if errors[-1] < to_beat - tolerance:
            to_beat, waited = errors[-1], 0
        else:
            waited += 1
    return best[1], best[2], errors


def concept(strength, tokens, ahead):
    """Weights of the tokens at, or right after, the 50 strongest activations."""
    T = tokens.shape[1]
    places = sorted(
        ((n, t) for n in range(len(tokens)) for t in range(T) if strength[n, t] > 0),
        key=lambda p: (-strength[p], p),
    )[:50]
    near = [tokens[n, t + ahead] for n, t in places if t + ahead < T]
    flat, weights = tokens.reshape(-1).tolist(), {}
    for token in set(near):
        hits, share = near.count(token), flat.count(token) / len(flat)
        weight = hits * np.log(hits / len(near) / share)
        if hits >= 2 and weight > 0:
            weights[token] = weight
    return weights
