"""The variational rule: its distance, what it is without noise, training (slow)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import RULES, SAE, Rule, from_selection, select, to_dense
from sae_jax.rules.variational import deviation, kl
from sae_jax.training.terms import loss_terms
from tests.conftest import planted
from tests.contract import D, F, build, forward, rows
from tests.test_methods import scores, train


def test_the_distance_from_a_standard_gaussian():
    mean, log_variance = jnp.array([[0.0, 1, 2]]), jnp.array([[0.0, -2, 1]])
    np.testing.assert_allclose(
        kl(mean, log_variance), [[0, 1.06767, 2.35914]], atol=1e-5
    )
    far = kl(jnp.array([[-30.0, 0]]), jnp.array([[0.0, 50]]))
    np.testing.assert_allclose(far, [[50, (np.exp(2) - 3) / 2]], rtol=1e-6)
    extremes = deviation(jnp.array([-99.0, -2, 99]))
    np.testing.assert_allclose(extremes, np.exp([-3, -1, 1]), rtol=1e-6)


def by_size(inputs, *, k: int = 4):
    return select.rows(jnp.abs(inputs.pre), k, count_max=k)


SIGNED = Rule(
    name="by_size",
    paper="",
    decides="",
    encode=from_selection(by_size, signed=True),
    example={},
    knob="k",
    signed=True,
    centres=False,
)


def passed(sae, variables, *, train):
    """Codes, and gradients of the loss."""

    def loss(params):
        given = variables._replace(params=params)
        out = forward(sae, given, rows(), train=train)
        idle = jnp.zeros(F, jnp.int32)
        return sum(loss_terms(out, None, idle, None).values()), to_dense(out.codes)

    grads, active = jax.grad(loss, has_aux=True)(variables.params)
    return active, grads


@pytest.mark.parametrize("below", [0, 1.0])
def test_without_noise_and_distance_it_is_topk_by_size(below, monkeypatch):
    monkeypatch.setattr(select, "SPARSE_BELOW", below)
    plain, variables = build(SAE(D, F, rule=SIGNED).bound)
    none = SAE(D, F, rule="variational(k=4, variance='none', coef=0)")
    for training in (True, False):
        found, expected = (passed(s, variables, train=training) for s in (none, plain))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert (expected[0] < 0).any()
    learned, held = build(SAE(D, F, rule="variational(k=4)").bound)
    held = held._replace(params={**held.params, **variables.params})
    evaluated = passed(learned, held, train=False)[0]
    np.testing.assert_array_equal(evaluated, expected[0])


def test_the_distance_rises_in_its_warm_up():
    sae, variables = build(SAE(D, F, "variational(k=4, coef=0.5, warmup=4)").bound)
    found = [
        float(forward(sae, variables, rows(), train=True, step=i).penalties["kl"].coef)
        for i in (0, 1, 4, 9)
    ]
    assert found == [0, 0.125, 0.5, 0.5]
    assert not forward(sae, variables, rows(), train=False).penalties


@pytest.mark.parametrize("over", ["all", "kept"])
def test_only_the_distance_of_all_moves_what_was_not_kept(over):
    sae, variables = build(SAE(D, F, f"variational(k=1, {over=})").bound)
    active, grads = passed(sae, variables, train=True)
    idle = ~(np.asarray(active) != 0).any(0)
    assert idle.sum() > 20
    for name in ("W_enc", "b_enc", "W_var", "b_var"):
        moved = np.asarray(grads[name])[idle].any()
        assert moved == (over == "all"), name


# Training on planted truth, as in test_methods; coefficients of a loss summed over
# width, / 32. Bands leave slack around two measured seeds.

STRENGTHS = (0, 0.01, 0.1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_distance_of_all_costs_more_than_that_of_the_kept(seed):
    x, directions, _ = planted(32, 64, 0.05, 40_000, seed)
    assert RULES["variational"].aux_k  # as in the other trainings here
    found = {}
    for over in ("all", "kept"):
        for beta in STRENGTHS:
            rule = f"variational(k=3, coef={beta / 32}, over={over!r})"
            sae, variables, _ = train(rule, x, 4000, seed, n_features=64)
            fvu, _, mmcs = scores(sae, variables, x, directions)
            active = np.asarray(to_dense(sae.encode(variables, jnp.asarray(x))))
            dead = int((active == 0).all(0).sum())
            negative = (active < 0).sum() / (active != 0).sum()
            found[over, beta] = fvu
            print(
                f"{over:5} beta {beta:5} FVU {fvu:.3f} MMCS {mmcs:.3f} dead {dead} "
                f"negative {negative:.2f}"
            )
    every = [found["all", beta] for beta in STRENGTHS]
    assert every == sorted(every)
    assert every[-1] > 0.9
    assert found["kept", 1] < 0.8 * found["all", 1]
