"""Slow float64 versions of what the rules compute, for tests to hold the package to.

Written from the formulas of the papers, in NumPy, without a line of the package.
A transcoder, which does not centre, has `b_dec` 0 in the params that codes are asked
for with. Finite differences know no stop-gradient: `frozen` adds copies for it. What a
rule remembers is among the params; noise that it draws is in `hp`.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tests import zipf_oracles

Array = np.ndarray
Params = dict[str, np.ndarray]
Hp = dict[str, Any]
Terms = dict[str, float]


def preactivations(x: Array, params: Params, *, bias: bool = True) -> Array:
    pre = (x - params["b_dec"]) @ params["W_enc"].T
    return pre + params["b_enc"] if bias else pre


def row_norms(rows: Array) -> Array:
    return np.array([math.sqrt(sum(v * v for v in row)) for row in rows])


def mse(a: Array, b: Array) -> float:
    return float(np.mean((a - b) ** 2))


def reconstruct(codes: Array, params: Params) -> Array:
    scale = params.get("scale", np.ones(codes.shape[1]))  # of a tied dictionary
    return (codes * scale) @ params["W_dec"] + params["b_dec"]


def standardise(x: Array) -> tuple[Array, Array, Array]:
    """The treated rows, and the spread and mean that undo it (`* spread + mean`)."""
    n = x.shape[1]
    mean = np.array([[sum(row) / n] for row in x])
    spread = row_norms(x - mean)[:, None] / math.sqrt(n - 1)
    return (x - mean) / (spread + 1e-5), spread, mean


def largest(scores: Array, count: int) -> list[int]:
    """Where the `count` largest are; of equal ones, the first."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count]


def relu(x: Array, params: Params, hp: Hp) -> Array:
    return np.maximum(preactivations(x, params), 0)


def topk(x: Array, params: Params, hp: Hp) -> Array:
    pre = preactivations(x, params)
    codes = np.zeros_like(pre)
    for b, row in enumerate(pre):
        for j in largest(row, math.ceil(hp["k"])):
            codes[b, j] = max(row[j], 0)
    return codes


def gradient_topk(x: Array, params: Params, hp: Hp) -> Array:
    if hp.get("grad_x") is None:
        return topk(x, params, hp)
    pre = preactivations(x, params)
    codes = np.zeros_like(pre)
    for b, g in enumerate(hp["grad_x"]):
        length = math.sqrt(sum(v * v for v in g))
        g = g / length if hp["normalise"] and length else g
        scores = np.zeros(len(pre[b]))
        for j, direction in enumerate(params["W_dec"]):
            effect = abs(sum(v * w for v, w in zip(direction, g, strict=True)))
            scores[j] = hp["beta"] * pre[b, j] * effect
            scores[j] += pre[b, j] if hp["mode"] == "add" or not g.any() else 0
        for j in largest(scores, math.ceil(hp["k"])):
            codes[b, j] = max(pre[b, j], 0)
    return codes


def batch_topk(x: Array, params: Params, hp: Hp) -> Array:
    pre = preactivations(x, params)
    budget = math.floor(Fraction(str(hp["k"])) * len(x))  # 0.29 * 100 is 29, not 28.99
    active = np.maximum(pre, 0).reshape(-1)
    codes = np.zeros_like(active)
    for i in largest(active, budget):
        codes[i] = active[i]
    return codes.reshape(pre.shape)


def norm_cut(strengths: Array, target: Array, how: str) -> Array:
    """Mask of the m largest strengths whose norm c_m meets the target norm."""
    mask = np.zeros(strengths.shape, bool)
    n_features = strengths.shape[1]
    for b, row in enumerate(strengths):
        order = largest(row, n_features)
        c = np.sqrt(np.cumsum(row[order] ** 2))
        if how == "nearest":
            c[1:][-1:] = np.inf  # keeping all is never nearest, unless all is one
            m = 1 + int(np.argmin(np.abs(c - target[b])))
        else:
            reached = [i for i in range(n_features) if c[i] >= target[b]]
            m = 1 + reached[0] if reached else n_features
        mask[b, order[:m]] = True
    return mask


def top_afa(x: Array, params: Params, hp: Hp) -> Array:
    active = np.maximum(preactivations(x, params, bias=False), 0)
    meant = x - params["b_dec"] if hp["target"] == "centred" else x
    strengths = active * row_norms(params["W_dec"])
    return np.where(norm_cut(strengths, row_norms(meant), hp["how"]), active, 0)


def jump_relu(x: Array, params: Params, hp: Hp) -> Array:
    pre = preactivations(x, params)
    return np.where(pre > np.exp(params["log_threshold"]), pre, 0)


def gated(x: Array, params: Params, hp: Hp) -> Array:
    shared = preactivations(x, params, bias=False)
    magnitude = np.maximum(np.exp(params["r_mag"]) * shared + params["b_mag"], 0)
    return np.where(shared + params["b_enc"] > 0, magnitude, 0)


def feature_choice(x: Array, params: Params, hp: Hp) -> Array:
    """Of a fresh SAE, whose features have never fired."""
    pre = preactivations(x, params)
    return zipf_oracles.feature_choice(pre, hp, [0.0] * pre.shape[1])


def matching_pursuit(x: Array, params: Params, hp: Hp) -> Array:
    atoms, lengths = params["W_dec"], row_norms(params["W_dec"])
    codes = np.zeros((len(x), len(atoms)))
    for b, row in enumerate(x - params["b_dec"]):
        left = row
        for _ in range(math.ceil(hp["k"])):
            along = np.array([sum(atom * left) for atom in atoms]) / lengths
            j = largest(along, 1)[0]
            if along[j] <= 1e-14 * math.sqrt(sum(row**2)):  # rounding errors
                break
            again = codes[b, j] != 0
            codes[b, j] += along[j] / lengths[j]
            left = left - along[j] / lengths[j] * atoms[j]
            if math.sqrt(sum(left**2)) < hp["tau"] or (hp["until_repeat"] and again):
                break
    return codes


def group_bias(x: Array, params: Params, hp: Hp) -> Array:
    u = x @ params["W_dec"].T
    pre = u + params["unit"] * params["bias"]
    return np.where(pre > 0, u if hp["form"] == "jump" else pre, 0)


def gaussians(x: Array, params: Params, hp: Hp) -> tuple[Array, Array]:
    """Means and logarithms of variances."""
    mean = x @ params["W_enc"].T + params["b_enc"]
    if hp["variance"] != "learned":
        return mean, np.zeros_like(mean)
    return mean, np.clip(x @ params["W_var"].T + params["b_var"], -6, 2)


def variational(x: Array, params: Params, hp: Hp) -> Array:
    z, log_variance = gaussians(x, params, hp)
    if hp["variance"] != "none":
        z = z + np.sqrt(np.exp(log_variance)) * hp["noise"]
    codes = np.zeros_like(z)
    for b, row in enumerate(z):
        for j in largest(abs(row), math.ceil(hp["k"])):
            codes[b, j] = row[j]
    return codes


CODES: dict[str, Callable[[Array, Params, Hp], Array]] = {
    "relu": relu,
    "topk": topk,
    "gradient_topk": gradient_topk,
    "batch_topk": batch_topk,
    "top_afa": top_afa,
    "jump_relu": jump_relu,
    "gated": gated,
    "matryoshka": batch_topk,
    "mutual_choice": batch_topk,
    "feature_choice": feature_choice,
    "matching_pursuit": matching_pursuit,
    "group_bias": group_bias,
    "variational": variational,
}


def frozen(params: Params) -> Params:
    """Copies of the decoder for the terms that must not move it."""
    return {"sg(W_dec)": params["W_dec"], "sg(b_dec)": params["b_dec"]}


def relu_terms(x: Array, params: Params, hp: Hp, codes: Array) -> Terms:
    price = row_norms(params["W_dec"]) if hp["decoder_weighted"] else 1
    return {"l1": hp["coef"] * sum((row * price).sum() for row in codes) / len(x)}


def top_afa_terms(x: Array, params: Params, hp: Hp, codes: Array) -> Terms:
    gaps = row_norms(codes) - row_norms(x)
    return {"afa": hp["coef"] * sum(gap**2 for gap in gaps) / len(x)}


def jump_relu_terms(x: Array, params: Params, hp: Hp, codes: Array) -> Terms:
    above = preactivations(x, params) > np.exp(params["log_threshold"])
    return {"l0": hp["coef"] * above.sum() / len(x)}


def gated_terms(x: Array, params: Params, hp: Hp, codes: Array) -> Terms:
    gate = np.maximum(preactivations(x, params), 0)
    W_dec = params.get("sg(W_dec)", params["W_dec"])
    b_dec = params.get("sg(b_dec)", params["b_dec"])
    l1 = hp["coef"] * gate.sum() / len(x)
    return {"l1": l1, "gate": mse(gate @ W_dec + b_dec, x)}


def gaussian_distance(mean: float, log_variance: float) -> float:
    """KL of a Gaussian from the standard one."""
    return (min(abs(mean), 10) ** 2 + math.exp(log_variance) - 1 - log_variance) / 2


def variational_terms(x: Array, params: Params, hp: Hp, codes: Array) -> Terms:
    mean, log_variance = gaussians(x, params, hp)
    total = sum(
        gaussian_distance(mean[place], log_variance[place])
        for place in np.ndindex(codes.shape)
        if hp["over"] == "all" or codes[place] != 0
    )
    return {"kl": hp["coef"] * total / len(x)}


LOSSES: dict[str, Callable[[Array, Params, Hp, Array], Terms]] = {
    "relu": relu_terms,
    "topk": lambda *_: {},
    "gradient_topk": lambda *_: {},
    "batch_topk": lambda *_: {},
    "top_afa": top_afa_terms,
    "jump_relu": jump_relu_terms,
    "gated": gated_terms,
    "matryoshka": lambda *_: {},
    "mutual_choice": lambda *_: {},
    "feature_choice": lambda *_: {},
    "matching_pursuit": lambda *_: {},
    "group_bias": lambda *_: {},
    "variational": variational_terms,
}


def matryoshka_losses(target, codes, params, hp: Hp) -> tuple[list[float], float]:
    """The error of each prefix of the dictionary (fractions of it), and their mean."""
    n_features = codes.shape[1]
    lengths = [round(fraction * n_features) for fraction in hp["prefixes"]]
    errors = []
    for m in [0, *lengths] if hp["bias_group"] else lengths:
        x_hat = codes[:, :m] @ params["W_dec"][:m] + params["b_dec"]
        errors.append(mse(x_hat, target))
    return errors, sum(errors) / len(errors)


def loss_terms(name, x, params: Params, hp: Hp, codes, target) -> Terms:
    """The reconstruction error and the rule's own terms."""
    error = mse(reconstruct(codes, params), target)
    if "prefixes" in hp:
        _, error = matryoshka_losses(target, codes, params, hp)
    return {"mse": error, **LOSSES[name](x, params, hp, codes)}


def aux_k(pre, dead, W_dec, residual, k, coef, normalise) -> float:
    """`coef *` the error of what the k strongest dead features make of the residual."""
    dead_ones = np.flatnonzero(dead)
    if len(dead_ones) == 0:
        return 0.0
    e_hat = np.zeros_like(residual)
    for b in range(len(pre)):
        for j in dead_ones[largest(pre[b, dead_ones], k)]:
            e_hat[b] += max(pre[b, j], 0) * W_dec[j]
    error = mse(e_hat, residual)
    if not normalise:
        return coef * error
    spread = mse(residual, residual.mean(0))
    return 0.0 if error == spread == 0 else coef * error / spread


def jump_gradients(pre, threshold, bandwidth, upstream) -> dict[str, Array]:
    """Pseudo-gradients of `pre * [pre > threshold]` (jump) and `[pre > threshold]`."""
    gradients = {n: np.zeros_like(pre) for n in ("jump_pre", "step_pre")}
    gradients |= {n: 0 * threshold for n in ("jump_threshold", "step_threshold")}
    for (b, j), z in np.ndenumerate(pre):
        theta, g = threshold[j], upstream[b, j]
        gradients["jump_pre"][b, j] = g if z > theta else 0
        if abs((z - theta) / bandwidth) < 1 / 2:
            gradients["jump_threshold"][j] += -theta / bandwidth * g
            gradients["step_threshold"][j] += -1 / bandwidth * g
    return gradients


def running_threshold(batches: Sequence[Array], decay: float) -> float:
    """Exponential average of the smallest positive code, where a batch has one."""
    smallest = [codes[codes > 0].min() for codes in batches if (codes > 0).any()]
    weights = [decay**age for age in reversed(range(len(smallest)))]
    seen = zip(weights, smallest, strict=True)
    return sum(w * v for w, v in seen) / sum(weights) if smallest else 0.0


def threshold_codes(x: Array, params: Params, threshold: float) -> Array:
    """Codes of the batch rules in evaluation."""
    active = np.maximum(preactivations(x, params), 0)
    return np.where(active > threshold, active, 0)


def geometric_median(sample: Array) -> Array:
    """Descent on the summed distance; a step that does not lower it is halved."""
    point, step = np.median(sample, axis=0), 1.0
    height = row_norms(sample - point).sum()
    while step > 1e-12:
        away = point - sample
        trial = point - step * (away / row_norms(away)[:, None]).mean(0)
        trial_height = row_norms(sample - trial).sum()
        if trial_height < height:
            point, height, step = trial, trial_height, step * 1.5
        else:
            step /= 2
    return point


def finite_differences(loss: Callable, params: Params, eps: float = 1e-5) -> Params:
    """Central differences of `loss` by every entry of every parameter."""
    gradients = {name: np.zeros_like(value) for name, value in params.items()}
    for name, value in params.items():
        for index in np.ndindex(value.shape):
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * eps
                rise = sign * loss({**params, name: moved})
                gradients[name][index] += rise / (2 * eps)
    return gradients
