"""SAEs with F features on the toy language model, and what they do, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import SAE
from sae_jax.evaluation.heldout import HeldOut
from tests import oracles
from tests.toys import DOCUMENTS, PACKING, TOKENS, toy_lm

SITE, AIM = "resid_post.0", "mlp_out.1"
F = 128
# float32 sums of 16 products in another order; values are below 20.
NEAR = 2e-5


def held_out(n=7, **changes):
    """Contexts of one document each, most of them padded."""
    packing = PACKING._replace(join=False, skip=1, **changes)
    return HeldOut.read(DOCUMENTS, TOKENS, packing, n)


def trained(spec, *, width=16, **options):
    """An SAE with biases, uneven decoder rows and a threshold."""
    rng = np.random.default_rng(5)
    sae = SAE(width, F, rule=spec, **options)
    sample = jnp.asarray(rng.normal(size=(50, width)) + 0.5, jnp.float32)
    target = jnp.ones((50, sae.width_out))
    variables = sae.init(jax.random.key(0), sample=sample, target_sample=target)
    params = {
        name: jnp.asarray(p + 0.3 * rng.normal(size=p.shape), jnp.float32)
        for name, p in sorted(variables.params.items())
    }
    state = dict(variables.state)
    if state:  # a threshold of 1.5
        state = {
            "threshold_sum": jnp.asarray(1.35),
            "threshold_weight": jnp.asarray(0.9),
        }
    return sae, variables._replace(params=params, state=state)


def values_at(heldout, site):
    """Each context given to the model alone; float64, position after position."""
    values = [toy_lm().run(t[None], read=(site,)).values[site] for t in heldout.tokens]
    return np.concatenate([np.asarray(v[0], np.float64) for v in values])


def slow(sae, variables, heldout, target_site=None):
    """In NumPy, every position: codes, norm_z and norm_f."""
    params = {n: np.asarray(p, np.float64) for n, p in variables.params.items()}
    x, treated = values_at(heldout, SITE), values_at(heldout, SITE)
    z = x if target_site is None else values_at(heldout, target_site)
    if sae.treatment == "standardise":
        treated = z = oracles.standardise(x)[0]
    elif sae.treatment == "scale":
        treated = x * float(variables.constants["scale_in"])
        z = z * float(variables.constants["scale_out"])
    seen = params if target_site is None else {**params, "b_dec": np.zeros(16)}
    if variables.state:
        codes = oracles.threshold_codes(treated, seen, 1.5)
    else:
        codes = oracles.CODES[sae.bound.rule.name](treated, seen, sae.bound.hp)
    squares = (codes * oracles.row_norms(params["W_dec"])) ** 2
    norm_f = np.sqrt(squares.sum(1) + (params["b_dec"] ** 2).sum())
    return codes, oracles.row_norms(z), norm_f
