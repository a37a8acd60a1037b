"""SAEs measured twice: by the package, and row by row in NumPy."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import SAE, Variables
from sae_jax.evaluation import Mean, Measurement
from tests import oracles

# Relative; float64 sums taken in another order.
EXACT = 1e-11


class Case(NamedTuple):
    sae: SAE
    variables: Variables
    x: np.ndarray
    target: np.ndarray | None


def case(spec, *, n=23, d=16, f=64, **options):
    """An SAE with biases, uneven decoder rows and memory; rows off the origin."""
    rng = np.random.default_rng(5)
    sae = SAE(d, f, rule=spec, dtype="float64", **options)
    x = 1.3 * rng.normal(size=(n, d)) + 0.7
    target = 2 * rng.normal(size=(n, sae.width_out)) - 0.4
    samples = {"sample": jnp.asarray(x), "target_sample": jnp.asarray(target)}
    variables = sae.init(jax.random.key(0), **samples)
    params = {
        name: p + 0.3 * rng.normal(size=p.shape)
        for name, p in sorted(variables.params.items())
    }
    state = {name: jnp.asarray(0.9) for name in variables.state}
    if state:
        state["threshold_sum"] = jnp.asarray(0.9 * 1.5)  # a threshold of 1.5
    variables = variables._replace(params=jax.tree.map(jnp.asarray, params))
    aim = target if sae.is_transcoder else None
    return Case(sae, variables._replace(state=state), x, aim)


def mean_of(rows, mask=None):
    mean = Mean()
    mean.add(rows, mask=mask)
    return mean.finish()


def measure(c, cuts=(), mask=None, mean=None):
    """One measurement, the rows cut into batches; and the reconstructions."""
    aim = c.x if c.target is None else c.target
    mean = mean_of(aim, mask) if mean is None else mean
    measurement, x_hats = Measurement(c.sae, c.variables, mean), []
    for part in np.split(np.arange(len(c.x)), cuts):
        x_hats.append(
            measurement.add(
                jnp.asarray(c.x[part]),
                target=None if c.target is None else jnp.asarray(c.target[part]),
                mask=None if mask is None else jnp.asarray(mask[part]),
            )
        )
    return measurement.finish(), np.concatenate(x_hats)


def pass_of(c):
    """In NumPy: target, reconstruction, both also treated; codes; parameters."""
    params = {name: np.asarray(p) for name, p in c.variables.params.items()}
    aim = c.x if c.target is None else c.target
    scale_in, scale_out, shift = np.ones((1, 1)), np.ones((1, 1)), 0.0
    treated, z = c.x, aim
    if c.sae.treatment == "standardise":
        treated, scale_out, shift = oracles.standardise(c.x)
        z = treated
    elif c.sae.treatment == "scale":
        scale_in, inverse = (
            math.sqrt(rows.shape[1]) / oracles.row_norms(rows).mean()
            for rows in (c.x, aim)
        )
        treated, z, scale_out = c.x * scale_in, aim * inverse, 1 / inverse
    seen = params
    if c.target is not None:
        seen = {**params, "b_dec": np.zeros(c.sae.d_in)}
    if c.variables.state:
        codes = oracles.threshold_codes(treated, seen, 1.5)
    else:
        bound = c.sae.bound
        codes = oracles.CODES[bound.rule.name](treated, seen, bound.hp)
    z_hat = codes @ params["W_dec"] + params["b_dec"]
    return aim, z, z_hat, z_hat * scale_out + shift, codes, params


def length(row):
    return math.sqrt(sum(v * v for v in row))


def slow_scores(aim, z, z_hat, x_hat, codes, params):
    """Every score, one row after the other; and what is kept of each row."""
    (n, width), F = aim.shape, codes.shape[1]
    mean = [sum(row[d] for row in aim) / n for d in range(width)]
    price = oracles.row_norms(params["W_dec"])
    bias = [float(b) for b in params["b_dec"]]
    rows = []
    for a, treated, treated_hat, b, code in zip(
        aim, z, z_hat, x_hat, codes, strict=True
    ):
        error = sum((u - v) ** 2 for u, v in zip(a, b, strict=True))
        spread = sum((u - m) ** 2 for u, m in zip(a, mean, strict=True))
        dot = sum(u * v for u, v in zip(a, b, strict=True))
        alone = [c * p for c, p in zip(code, price, strict=True)]
        f, zz = length([*alone, *bias]), length(treated)
        centred = length([u - v for u, v in zip(treated, bias, strict=True)])
        wrong = sum((u - v) ** 2 for u, v in zip(treated, treated_hat, strict=True))
        rows.append(
            {
                "l0": sum(c != 0 for c in code),
                "l1": sum(abs(c) for c in alone),
                "error": error,
                "spread": spread,
                "explained": 1 - error / spread,
                "cosine": dot / (length(a) * length(b)),
                "dot": dot,
                "square": length(b) ** 2,
                "ratio": f / zz,
                "centred": length(alone) / centred,
                "over": f > zz,
                "under": f < zz,
                "afa": abs(f - zz) / zz,
                "epsilon": abs(zz**2 - f**2) / ((F - 1) * f**2),
                "nmse": wrong / zz**2,
            }
        )
    each = {name: [row[name] for row in rows] for name in rows[0]}
    total = {name: sum(column) for name, column in each.items()}
    fired = [sum(code[j] != 0 for code in codes) for j in range(F)]
    scores = {
        "l0": total["l0"] / n,
        "l1": total["l1"] / n,
        "description_length": total["l0"] / n * (7 + math.log(F) / math.log(2)),
        "mse": total["error"] / n / width,
        "nmse": total["error"] / total["spread"],
        "explained_variance": 1 - total["error"] / total["spread"],
        "explained_variance_per_row": total["explained"] / n,
        "cosine": total["cosine"] / n,
        "relative_reconstruction_bias": total["square"] / total["dot"],
        "dead": sum(count == 0 for count in fired),
        "dense": sum(10 * count > n for count in fired),
        "norm_ratio": sorted(each["ratio"])[n // 2],  # n is odd
        "norm_ratio_centred": sorted(each["centred"])[n // 2],
        "over_activation": total["over"] / n,
        "under_activation": total["under"] / n,
        "afa_error": total["afa"] / n,
        "epsilon_lbo": sorted(each["epsilon"])[n // 2],
    }
    return scores, each


def same_scores(found, expected, tolerance=EXACT):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, err_msg=name)


def by_hand(W_enc, W_dec, b_dec=None, *, spec="relu", **options):
    """An SAE of given matrices, float32."""
    W_enc, W_dec = jnp.asarray(W_enc, "float32"), jnp.asarray(W_dec, "float32")
    n_features, d_in = W_enc.shape
    sae = SAE(d_in, n_features, rule=spec, **options)
    variables = sae.init(jax.random.key(0))
    b_dec = jnp.zeros(W_dec.shape[1]) if b_dec is None else jnp.asarray(b_dec)
    params = {**variables.params, "W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    return sae, variables._replace(params=params)
