"""Recorded firings against contexts read one by one and codes written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE
from sae_jax.codes import Sparse
from sae_jax.evaluation.firings import record
from sae_jax.evaluation.heldout import HeldOut
from tests.toy_saes import AIM, NEAR, SITE, F, held_out, slow, trained
from tests.toys import toy_lm

CASES = {
    "dense": {"spec": "relu"},
    "dense standardise": {"spec": "relu", "treatment": "standardise"},
    "sparse": {"spec": "topk(k=2)"},
    "sparse scale": {"spec": "topk(k=2)", "treatment": "scale"},
    "top_afa": {"spec": "top_afa", "treatment": "standardise"},
    "threshold": {"spec": "batch_topk(k=2.0)"},
    "gated": {"spec": "gated", "treatment": "scale"},
    "transcoder": {"spec": "topk(k=2)", "d_out": 16, "treatment": "scale"},
}


@pytest.mark.parametrize("name", CASES)
def test_every_firing_is_the_oracles_and_no_other(name):
    heldout, target_site = held_out(), None if name != "transcoder" else AIM
    sae, variables = trained(**CASES[name])
    found = record(
        toy_lm(),
        sae,
        variables,
        SITE,
        heldout,
        target_site=target_site,
        contexts_per_pass=3,
    )
    codes, norm_z, norm_f = slow(sae, variables, heldout, target_site)
    used = heldout.use.reshape(-1)
    assert 0 < used.sum() < len(used) - 7  # padding, not only BOS
    assert found.starts[0] == 0
    assert found.starts[-1] == len(found.rows) == (codes[used] != 0).sum() > 0
    for feature in range(F):
        rows, values = found.of(feature)
        expected = [r for r in range(len(used)) if used[r] and codes[r, feature] != 0]
        assert rows.tolist() == expected
        np.testing.assert_allclose(values, codes[expected, feature], atol=NEAR)
    for ours, theirs in ((found.norm_z, norm_z), (found.norm_f, norm_f)):
        np.testing.assert_array_equal(np.isnan(ours), ~used)
        np.testing.assert_allclose(ours[used], theirs[used], rtol=NEAR)
    np.testing.assert_array_equal(found.tokens, heldout.tokens)
    np.testing.assert_array_equal(found.use, heldout.use)


def test_both_forms_of_codes_are_among_the_cases():
    kinds = []
    for name in ("dense", "sparse"):
        sae, variables = trained(**CASES[name])
        kinds.append(isinstance(sae.encode(variables, jnp.ones((2, 16))), Sparse))
    assert kinds == [False, True]


@pytest.mark.parametrize("name", ["dense", "sparse", "threshold"])
def test_it_does_not_matter_how_many_contexts_are_read_at_once(name):
    heldout = held_out()
    sae, variables = trained(**CASES[name])
    whole, *others = (
        record(toy_lm(), sae, variables, SITE, heldout, contexts_per_pass=n)
        for n in (7, 1, 3, 16)
    )
    for other in others:
        np.testing.assert_array_equal(other.starts, whole.starts)
        np.testing.assert_array_equal(other.rows, whole.rows)
        # Programs for other shapes differ in the last bits.
        np.testing.assert_allclose(other.values, whole.values, atol=NEAR)
        np.testing.assert_allclose(other.norm_z, whole.norm_z, rtol=NEAR)
        np.testing.assert_allclose(other.norm_f, whole.norm_f, rtol=NEAR)


def test_where_nothing_is_used_nothing_fires():
    """A bias that makes every feature fire on every row, zeros and padding included."""
    heldout = held_out()
    sae, variables = trained("relu")
    params = {**variables.params, "b_enc": jnp.full(F, 1000.0)}
    loud = variables._replace(params=params)
    found = record(toy_lm(), sae, loud, SITE, heldout, contexts_per_pass=4)
    used = np.flatnonzero(heldout.use)
    for feature in (0, F - 1):
        assert found.of(feature)[0].tolist() == used.tolist()
    quiet = variables._replace(
        params={**variables.params, "b_enc": -loud.params["b_enc"]}
    )
    found = record(toy_lm(), sae, quiet, SITE, heldout)
    assert len(found.rows) == len(found.values) == 0
    assert found.starts.tolist() == [0] * (F + 1)
    np.testing.assert_allclose(
        found.norm_f[used], jnp.linalg.norm(quiet.params["b_dec"]), rtol=NEAR
    )


class Known:
    """A model whose only site holds what it is told, at every position."""

    def __init__(self, values):
        self.values = np.asarray(values, np.float32)

    def run(self, tokens, *, read):
        start = tokens[0, 0]  # the number of the context, in these tests
        part = self.values[start : start + len(tokens)]
        return type("Run", (), {"values": {s: jnp.asarray(part) for s in read}})


@pytest.mark.usefixtures("as_users")
def test_two_contexts_of_three_worked_by_hand():
    """Two features: the first entry, and twice the second, where above 0."""
    values = [[[1, 0], [0, 2], [3, 1]], [[9, 9], [-1, 4], [5, -1]]]
    tokens = np.array([[0, 7, 8], [1, 9, 6]], np.int32)
    use = np.array([[1, 1, 1], [0, 1, 1]], bool)
    sae = SAE(2, 2, rule="relu")
    params = {
        "W_enc": jnp.array([[1.0, 0], [0, 2]]),
        "b_enc": jnp.zeros(2),
        "W_dec": jnp.array([[3.0, 0], [0, 1]]),
        "b_dec": jnp.zeros(2),
    }
    variables = sae.init(jax.random.key(0))._replace(params=params)
    heldout = HeldOut(tokens, use, use)
    for n in (1, 2):
        found = record(
            Known(values), sae, variables, "site", heldout, contexts_per_pass=n
        )
        assert found.n_features == 2
        assert found.starts.tolist() == [0, 3, 6]
        assert found.rows.tolist() == [0, 2, 5, 1, 2, 4]
        assert found.values.tolist() == [1, 3, 5, 4, 2, 8]
        nan = float("nan")
        norm_z = [1, 2, 10**0.5, nan, 17**0.5, 26**0.5]
        np.testing.assert_allclose(found.norm_z, norm_z, rtol=1e-6)  # float32
        norm_f = [3, 4, 85**0.5, nan, 8, 15]
        np.testing.assert_allclose(found.norm_f, norm_f, rtol=1e-6)
        assert found.tokens.reshape(-1)[found.of(0)[0]].tolist() == [0, 8, 6]


@pytest.mark.usefixtures("as_users")
def test_too_many_firings_are_refused_before_they_are_all_there():
    heldout = held_out(6)
    sae, variables = trained("topk(k=2)")
    asked = []

    class Watched:
        def run(self, tokens, **options):
            asked.append(len(tokens))
            return toy_lm().run(tokens, **options)

    def ask(limit):
        asked.clear()
        return record(
            Watched(), sae, variables, SITE, heldout, contexts_per_pass=1, limit=limit
        )

    n = len(ask(10**6).rows)
    assert len(ask(n).rows) == n
    message = rf"{n} firings in 6 of 6 .* GB: give 5 contexts, a sparser .*limit={n}\."
    with pytest.raises(ValueError, match=message):
        ask(n - 1)
    with pytest.raises(ValueError, match=r"^\d+ firings in 1 of 6 contexts; .* is 1\."):
        ask(1)
    assert len(asked) == 1


@pytest.mark.usefixtures("as_users")
def test_bad_questions_are_refused_with_the_remedy():
    heldout, (sae, variables) = held_out(2), trained("relu")
    transcoder, theirs = trained("relu", d_out=16)

    def ask(of, arrays, held=heldout, site=SITE, **options):
        return record(toy_lm(), of, arrays, site, held, **options)

    with pytest.raises(ValueError, match="contexts_per_pass=0 must be above 0"):
        ask(sae, variables, contexts_per_pass=0)
    with pytest.raises(ValueError, match=r"No position .* is used"):
        ask(sae, variables, heldout._replace(use=heldout.use & False))
    with pytest.raises(ValueError, match=r"target_site=None .* a transcoder needs"):
        ask(transcoder, theirs)
    with pytest.raises(ValueError, match="an autoencoder takes none"):
        ask(sae, variables, target_site=AIM)
    with pytest.raises(ValueError, match=r"x has shape \(128, 64\); needed"):
        ask(sae, variables, site="mlp_hidden.0")
    with pytest.raises(ValueError, match=r"target has shape \(128, 64\); needed"):
        ask(transcoder, theirs, target_site="mlp_hidden.0")
