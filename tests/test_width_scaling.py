"""The law of widths, and errors of tokens that are predicted from smaller widths."""

import numpy as np
import pytest

from sae_jax.analysis.width_scaling import predict_larger, width_law
from tests import analysis_oracles as oracles

WIDTHS = [256, 512, 1024, 2048, 4096]


def test_a_planted_law_is_found():
    fvus = [0.1 + 2 * w**-0.5 for w in WIDTHS]
    law = width_law(WIDTHS[:4], fvus[:4])
    np.testing.assert_allclose(law[:3], [0.1, 2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(law(np.array(WIDTHS)), fvus, rtol=1e-6)
    assert max(law.c_error, law.m_error) < 1e-6
    # The order of the points is no matter, nor is their scale.
    again = width_law(WIDTHS[::-1], [1e-6 * fvu for fvu in reversed(fvus)])
    np.testing.assert_allclose(again[:3], [1e-7, 2e-6, 0.5], rtol=1e-5)


def test_points_beside_the_law_widen_what_is_said_of_it():
    noise = np.random.default_rng(0).normal(size=5) * 0.002
    law = width_law(
        WIDTHS, [0.1 + 2 * w**-0.5 + e for w, e in zip(WIDTHS, noise, strict=True)]
    )
    assert 0 < abs(law.m - 0.5) < 3 * law.m_error
    assert 0 < abs(law.c - 0.1) < 3 * law.c_error


@pytest.mark.parametrize(
    ("widths", "fvus", "why"),
    [
        ([256, 512, 1024], [0.3, 0.2, 0.1], "3 widths; c"),
        ([256, 512, 512, 1024], [0.3, 0.2, 0.2, 0.1], "3 widths; c"),
        (WIDTHS, [0.1, 0.2, 0.3, 0.4, 0.5], "does not fall"),
        (WIDTHS, [0.1] * 5, "does not fall"),
        (WIDTHS, [0.3, 0.2, 0.2, 0.2, 0.2], "falls once"),
        (WIDTHS, [0.3, 0.2, float("nan"), 0.1, 0.1], "an SAE diverged"),
    ],
)
def test_points_that_tell_no_law_are_refused(widths, fvus, why):
    with pytest.raises(ValueError, match=why):
        width_law(widths, fvus)


def test_a_fit_that_finds_no_end_is_refused(monkeypatch):
    def no_end(*_, **__):
        raise RuntimeError("Optimal parameters not found")

    monkeypatch.setattr("sae_jax.analysis.width_scaling.curve_fit", no_end)
    with pytest.raises(ValueError, match=r"no law .*: Optimal parameters not found"):
        width_law(WIDTHS, [0.3, 0.2, 0.15, 0.12, 0.11])


def test_errors_of_tokens_are_predicted_on_other_tokens():
    rng = np.random.default_rng(0)
    smaller = rng.gamma(2, size=(2000, 2))
    noise = rng.normal(size=2000)
    larger = 0.7 * smaller[:, 0] + 0.2 * smaller[:, 1] + 1 + 0.3 * noise
    fitted = np.arange(2000) < 900
    found = predict_larger(smaller, larger, fitted)
    y = larger[:, None]
    W, b = oracles.least_squares(smaller[fitted], y[fitted], intercept=True)
    expected = oracles.r2(y[~fitted], smaller[~fitted] @ W + b)
    np.testing.assert_allclose(found.r2, expected, rtol=1e-9)
    assert abs(expected - (1 - 0.09 / larger.var())) < 0.02
    assert abs(found.by_chance) < 0.02
    assert abs(predict_larger(smaller, noise, fitted).r2) < 0.02
