"""Direct effects against the final norm and the unembedding written out in NumPy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.evaluation.direct_effect import direct_effects
from sae_jax.evaluation.heldout import HeldOut
from sae_jax.lm.flax_lm import FlaxLM
from tests import oracles
from tests.toy_saes import AIM, SITE, F, held_out, trained, values_at
from tests.toys import toy_lm

# Logits of about 1 are differences of float32 sums; other shapes, other last bits.
NEAR = 5e-6
LAST = "resid_post.1"


@functools.cache
def lively():
    """The toy with a final norm that is not trivial."""
    lm, rng = toy_lm(), np.random.default_rng(2)
    scale, bias = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    within = {**lm.params["transformer"], "ln_f": {"scale": scale, "bias": bias}}
    return FlaxLM("lively", lm.module, lm.config, {"transformer": within})


def slow_logits(stream):
    """GPT-2 from its last residual stream on, in float64."""
    params = lively().params["transformer"]
    scale, bias = (np.asarray(params["ln_f"][n], np.float64) for n in ("scale", "bias"))
    centred = stream - stream.mean()
    normed = centred / np.sqrt((centred**2).mean() + lively().config.layer_norm_epsilon)
    return np.asarray(params["wte"]["embedding"], np.float64) @ (normed * scale + bias)


def slow_changes(sae, variables, heldout, amounts):
    """The change of every logit by every feature, `[F, V]`."""
    used = heldout.use.reshape(-1)
    mean = values_at(heldout, LAST)[used].mean(0)
    factor = 1.0
    if sae.treatment == "standardise":
        factor = oracles.standardise(values_at(heldout, SITE)[used])[1].mean()
    elif sae.treatment == "scale":
        factor = 1 / float(variables.constants["scale_out"])
    W_dec = np.asarray(variables.params["W_dec"], np.float64)
    plain = slow_logits(mean)
    shifts = factor * amounts[:, None] * W_dec
    return np.stack([slow_logits(mean + shift) - plain for shift in shifts])


CASES = {
    "plain": {},
    "standardise": {"treatment": "standardise"},
    "scale": {"treatment": "scale"},
}


@pytest.mark.parametrize("per_pass", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_effects_are_those_of_every_logit(name, per_pass):
    heldout, (sae, variables) = held_out(5), trained("relu", **CASES[name])
    amounts = np.random.default_rng(3).uniform(0.5, 3, F)
    amounts[[0, 9, F - 1]] = 0
    found = direct_effects(
        lively(), sae, variables, SITE, amounts, heldout, contexts_per_pass=per_pass
    )
    changes = slow_changes(sae, variables, heldout, amounts)
    assert np.abs(changes).max() > 0.1
    for j in range(F):
        if amounts[j] == 0:
            assert (found.raised[j] == -1).all()
            assert (found.lowered[j] == -1).all()
            assert np.isnan(found.raised_by[j]).all()
            assert np.isnan(found.lowered_by[j]).all()
            continue
        order = np.argsort(changes[j])
        ups, downs = order[::-1][:8], order[:8]
        np.testing.assert_allclose(found.raised_by[j], changes[j][ups], atol=NEAR)
        np.testing.assert_allclose(found.lowered_by[j], changes[j][downs], atol=NEAR)
        # The tokens themselves, but for those that tie within the rounding.
        np.testing.assert_allclose(
            changes[j][found.raised[j]], changes[j][ups], atol=NEAR
        )
        np.testing.assert_allclose(
            changes[j][found.lowered[j]], changes[j][downs], atol=NEAR
        )


def test_only_sites_of_the_residual_stream_have_effects():
    """By whatever name: the last of these is what the MLP adds."""
    heldout, (sae, variables) = held_out(2), trained("relu")

    def effects(site):
        return direct_effects(
            toy_lm(), sae, variables, site, np.ones(F), heldout, contexts_per_pass=2
        )

    for site in ("head_out.0", "mlp_hidden.1", "transformer.h.1.ln_1:out"):
        assert effects(site) is None
    stream = effects("resid_pre.0")
    for site in ("resid_mid.0", "attn_out.1", AIM, LAST, "transformer.h.0.mlp:out"):
        for ours, theirs in zip(effects(site), stream, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_both_sources_agree():
    pytest.importorskip("torch")
    from sae_jax.lm.torch_lm import TorchLM

    tokens = np.arange(2, 26, dtype=np.int32).reshape(2, 12)
    heldout = HeldOut(tokens, tokens > 0, tokens > 3)
    sae, variables = trained("relu", width=192)
    found = [
        direct_effects(
            lm, sae, variables, AIM, np.ones(F), heldout, contexts_per_pass=2
        )
        for lm in (FlaxLM.load("embedded"), TorchLM.load("embedded"))
    ]
    assert np.abs(found[0].raised_by).max() > 0.1
    for name in ("raised_by", "lowered_by"):
        ours, theirs = (getattr(effects, name) for effects in found)
        # Logits of about 10 of two libraries, in float32.
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
