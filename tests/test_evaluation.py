"""Rows that come in batches, against sums written out row by row."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE
from sae_jax.evaluation import Mean, Measurement
from tests import oracles
from tests.row_oracle import (
    EXACT,
    by_hand,
    case,
    mean_of,
    measure,
    pass_of,
    same_scores,
    slow_scores,
)

# Relative; the same program on other shapes, in float64.
SAME = 1e-12


CASES = {
    "relu none": {"spec": "relu"},
    "relu standardise": {"spec": "relu", "treatment": "standardise"},
    "relu scale": {"spec": "relu", "treatment": "scale"},
    "sparse codes": {"spec": "topk(k=1)", "treatment": "scale"},
    "sparse codes standardise": {"spec": "topk(k=1)", "treatment": "standardise"},
    "gated": {"spec": "gated"},
    "top_afa": {"spec": "top_afa", "treatment": "standardise"},
    "matryoshka": {
        "spec": "matryoshka(k=2.0, prefixes=(0.25, 1.0))",
        "treatment": "scale",
    },
    "transcoder": {"spec": "topk(k=1)", "d_out": 12, "treatment": "scale"},
    "transcoder of gates": {"spec": "gated", "d_out": 12},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_every_score_is_the_oracles(name):
    c = case(**CASES[name])
    aim, z, z_hat, x_hat, codes, params = pass_of(c)
    assert 0 < (codes != 0).mean() < 1
    found, x_hats = measure(c)
    scores, each = slow_scores(aim, z, z_hat, x_hat, codes, params)
    same_scores(found.scores, scores)
    np.testing.assert_allclose(x_hats, x_hat, rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(found.norm_z, oracles.row_norms(z), rtol=EXACT)
    np.testing.assert_allclose(found.norm_f / found.norm_z, each["ratio"], rtol=EXACT)
    np.testing.assert_allclose(found.relative_error, each["nmse"], rtol=EXACT)
    # A difference of two norms that are nearly equal.
    np.testing.assert_allclose(found.epsilon_lbo, each["epsilon"], rtol=1e-9)
    np.testing.assert_array_equal(found.density, (codes != 0).mean(0))


def test_both_forms_of_codes_are_measured():
    dense, sparse = (SAE(16, 64, rule=r) for r in ("relu", "topk(k=1)"))
    x = jnp.ones((2, 16))
    kinds = [
        isinstance(sae.encode(sae.init(jax.random.key(0)), x), jax.Array)
        for sae in (dense, sparse)
    ]
    assert kinds == [True, False]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("spec", ["topk(k=1)", "batch_topk(k=2.0)"])
def test_it_does_not_matter_how_the_rows_are_cut(spec):
    c = case(spec, treatment="scale")
    whole, x_hat = measure(c)
    for cuts in (range(1, len(c.x)), (7, 14, 16), (16,)):
        found, again = measure(c, cuts)
        same_scores(found.scores, whole.scores, SAME)
        for counted in ("l0", "dead", "dense", "over_activation"):
            assert found.scores[counted] == whole.scores[counted]
        np.testing.assert_array_equal(found.density, whole.density)
        np.testing.assert_allclose(found.norm_f, whole.norm_f, rtol=EXACT)
        np.testing.assert_allclose(again, x_hat, rtol=EXACT, atol=EXACT)


@pytest.mark.usefixtures("x64")
def test_what_processes_gather_can_be_sent_and_merged():
    c = case("topk(k=1)", treatment="scale")
    whole, _ = measure(c)
    means, parts = [], np.split(c.x, [9])
    for part in parts:
        means.append(Mean())
        means[-1].add(part)
    means[0].merge(pickle.loads(pickle.dumps(means[1])))
    np.testing.assert_allclose(means[0].finish(), c.x.mean(0), rtol=1e-14)
    measurements = [Measurement(c.sae, c.variables, means[0].finish()) for _ in parts]
    for measurement, part in zip(measurements, parts, strict=True):
        measurement.add(jnp.asarray(part))
    first, second = measurements
    kept = first.gathered
    first.merge(pickle.loads(pickle.dumps(second.gathered)))
    found = first.finish()
    same_scores(found.scores, whole.scores, SAME)
    np.testing.assert_array_equal(found.density, whole.density)
    np.testing.assert_allclose(found.norm_z, whole.norm_z, rtol=SAME)
    # What was read before stays as it was, and so does the other one.
    assert len(kept.rows.l0) == 9
    assert kept.fired.sum() == kept.rows.l0.sum()
    assert len(second.finish().norm_z) == len(c.x) - 9


def test_rows_on_eight_devices_have_the_same_scores():
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded_child"],
        cwd=Path(__file__).parent.parent,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2
    for n_devices, alone, spread in found.values():
        assert n_devices == 8
        same_scores(spread, alone, SAME)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("spec", ["relu", "topk(k=1)"])
def test_rows_that_do_not_count_leave_no_trace(spec):
    c = case(spec, d_out=12, treatment="scale")
    mask = np.arange(len(c.x)) % 3 != 1
    mask[14:] = False  # a whole batch without a row that counts
    spoilt = c._replace(x=c.x.copy(), target=c.target.copy())
    spoilt.x[~mask], spoilt.target[~mask] = np.nan, np.inf
    found, x_hat = measure(spoilt, (7, 14), mask=mask)
    alone, x_hat_alone = measure(c._replace(x=c.x[mask], target=c.target[mask]))
    same_scores(found.scores, alone.scores)
    assert len(found.norm_z) == mask.sum()
    np.testing.assert_array_equal(found.density, alone.density)
    np.testing.assert_allclose(x_hat[mask], x_hat_alone, rtol=EXACT, atol=EXACT)
    assert np.isfinite(x_hat).all()


@pytest.mark.parametrize("treatment", ["none", "standardise", "scale"])
def test_the_reconstruction_is_that_of_apply(treatment):
    sae = SAE(16, 64, rule="topk(k=5)", treatment=treatment)
    x = 4 * jax.random.normal(jax.random.key(2), (9, 16)) + 1
    variables = sae.init(jax.random.key(0), sample=x)
    for dtype in ("float32", "bfloat16"):
        rows = x.astype(dtype)
        measurement = Measurement(sae, variables, mean_of(rows))
        x_hat, expected = measurement.add(rows), sae.apply(variables, rows).x_hat
        assert x_hat.dtype == dtype
        # One program is compiled and the other not; float32 differs in the last bits.
        wide = (np.asarray(rows).astype(np.float32) for rows in (x_hat, expected))
        np.testing.assert_allclose(*wide, rtol=1e-2 if dtype == "bfloat16" else 1e-5)


def test_the_mean_is_exact_however_large_and_cut():
    rng = np.random.default_rng(1)
    x = (1e4 + rng.normal(size=(5000, 3))).astype(np.float32)
    mean = Mean()
    for part in np.split(x, [1, 2, 4000]):
        mean.add(jnp.asarray(part))
    np.testing.assert_allclose(mean.finish(), x.mean(0, dtype=np.float64), rtol=1e-14)


@pytest.mark.usefixtures("as_users")
def test_what_cannot_be_measured_is_refused_with_the_remedy():
    sae, variables = by_hand([[1], [-1]], [[1], [-1]])
    x = jnp.ones((3, 1))
    with pytest.raises(ValueError, match=r"mean has shape \(2,\).* width 1"):
        Measurement(sae, variables, np.zeros(2))
    measurement = Measurement(sae, variables, np.zeros(1))
    with pytest.raises(ValueError, match="No rows were added"):
        measurement.finish()
    measurement.add(x, mask=np.zeros(3, bool))
    with pytest.raises(ValueError, match="or all of them are masked"):
        measurement.finish()
    with pytest.raises(ValueError, match="No rows were added"):
        Mean().finish()
    with pytest.raises(ValueError, match="NaN or infinite values in 3 of 3"):
        measurement.add(x * jnp.nan)
    with pytest.raises(ValueError, match="takes no target"):
        measurement.add(x, target=x)
    transcoder = SAE(1, 2, rule="relu", d_out=1)
    measurement = Measurement(transcoder, variables, np.zeros(1))
    with pytest.raises(ValueError, match="measured against a target"):
        measurement.add(x)
    measurement = Measurement(sae, variables, np.zeros(1))
    measurement.add(x)
    one_more = measurement.gathered._replace(fired=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="counts 3 features, this SAE has 2; merge"):
        measurement.merge(one_more)
