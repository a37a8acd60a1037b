"""Reading, writing and gradients at the sites of Flax language models.

All against a GPT-2 in NumPy float64; other families are in test_lm_files.py.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.lm.edits import ablate, add, apply, replace, scale
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.lm.sites import FAMILIES, NEOX, Visit, family_of, site_names, tap
from tests import gpt2_oracle as oracle
from tests.compilations import compilations
from tests.gpt2_oracle import CONTEXT, LAYERS, NEAR, PLACES, SITES, VOCAB, edit_pair

ROWS, LENGTH = 2, 9
EVERYTHING = {"read": SITES, "logits": True, "losses": True}


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(scope="module")
def tokens():
    drawn = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH), np.int32)
    return jnp.asarray(drawn).at[:, 2].set(0)  # a token like any other, not padding


@pytest.fixture(scope="module")
def plain(weights, tokens):
    return oracle.forward(weights, tokens)


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    return oracle.write_folder(tmp_path_factory.mktemp("lm"), weights)


@pytest.fixture(scope="module")
def lm(folder):
    return FlaxLM.load(str(folder))


def some_positions():
    where = np.random.default_rng(3).random((ROWS, LENGTH)) < 0.5
    assert 0 < where.sum() < where.size
    return where


def test_every_site_the_logits_and_the_losses_are_the_oracles(lm, tokens, plain):
    run = lm.run(tokens, **EVERYTHING)
    oracle.assert_same_pass(run, plain)
    assert set(run.values) == set(SITES)
    assert run.values["resid_mid.1"].dtype == run.losses.dtype == jnp.float32


def test_all_sites_are_listed_with_their_widths(lm):
    assert sorted(lm.sites) == sorted(SITES)
    assert {site: lm.width(site) for site in SITES} == {
        site: oracle.WIDTHS[site.split(".")[0]] for site in SITES
    }
    assert (lm.n_layers, lm.context) == (LAYERS, CONTEXT)


def test_sites_are_listed_in_the_order_in_which_they_are_reached(lm, plain):
    assert lm.sites == list(plain.values)


def test_only_what_was_asked_for_comes_back(lm, tokens):
    run = lm.run(tokens, read=("mlp_out.1",))
    assert set(run.values) == {"mlp_out.1"}
    assert run.logits is None
    assert run.losses is None


@pytest.mark.parametrize("kind", ["replace", "add", "scale", "ablate", "apply"])
@pytest.mark.parametrize("place", PLACES)
def test_every_edit_at_every_place_is_the_oracles(
    place, kind, lm, weights, tokens, plain
):
    for layer, where in ((1, None), (LAYERS - 1, some_positions())):
        site = f"{place}.{layer}"
        edit, new = edit_pair(kind, place, tokens, where)
        expected = oracle.forward(weights, tokens, {site: new})
        # Op by op: what is compiled is tested below.
        found = lm.forward(lm.params, tokens, write={site: edit}, **EVERYTHING)
        oracle.assert_same_pass(found, expected)
        assert np.abs(expected.logits - plain.logits).max() > 0.1


def test_several_edits_at_once_are_the_oracles_when_compiled(lm, weights, tokens):
    kinds = {
        "resid_mid.0": "apply", "mlp_hidden.0": "ablate", "resid_pre.1": "add",
        "head_out.1": "scale", "attn_out.1": "replace", "resid_mid.1": "scale",
        "mlp_out.1": "apply", "resid_post.2": "add",
    }  # fmt: skip
    masks = {site: some_positions() for site in list(kinds)[::2]}
    pairs = {
        site: edit_pair(kind, site.split(".")[0], tokens, masks.get(site), seed)
        for seed, (site, kind) in enumerate(kinds.items())
    }
    write = {site: edit for site, (edit, _) in pairs.items()}
    edits = {site: new for site, (_, new) in pairs.items()}
    found = lm.run(tokens, write=write, **EVERYTHING)
    oracle.assert_same_pass(found, oracle.forward(weights, tokens, edits))


def test_modules_are_read_and_written_by_path_and_side(lm, weights, tokens):
    read = ("transformer.h.1.ln_2:in", "transformer.ln_f:out", "transformer.wte:out")
    run = lm.run(tokens, read=read, write={"transformer.wpe:out": ablate()})
    unplaced = weights | {"wpe.weight": 0 * weights["wpe.weight"]}
    expected = oracle.forward(unplaced, tokens)
    at_ln_2, last, embedded = (run.values[site] for site in read)
    np.testing.assert_allclose(at_ln_2, expected.values["resid_mid.1"], **NEAR)
    np.testing.assert_allclose(last @ weights["wte.weight"].T, expected.logits, **NEAR)
    np.testing.assert_array_equal(embedded, weights["wte.weight"][tokens])


@pytest.mark.parametrize("side", ["in", "out"])
def test_two_names_of_one_point_read_what_was_written_through_either(side):
    place, module = {"in": "resid_pre", "out": "resid_post"}[side], "transformer.h.0"
    names = [f"{module}:{side}", f"{place}.0"]
    for written in names:
        for order in (names, names[::-1]):
            taps = {site: tap(site, FAMILIES["gpt2"], LAYERS) for site in order}
            visit = Visit(taps, names, {written: lambda old: 10 * old})
            pass_by = visit.enter if side == "in" else visit.leave
            assert pass_by(module, 1.0) == 10
            assert visit.values == dict.fromkeys(names, 10)


def test_gradients_at_every_site_are_total_derivatives_of_the_summed_losses(
    lm, weights, tokens, plain
):
    run, grads = lm.gradients(tokens, SITES)
    oracle.assert_gradients(grads, weights, tokens)
    for site in SITES:
        np.testing.assert_allclose(run.values[site], plain.values[site], **NEAR)
    np.testing.assert_allclose(run.losses, plain.losses, **NEAR)
    _, alone = lm.gradients(tokens, ("resid_mid.1",))
    np.testing.assert_allclose(alone["resid_mid.1"], grads["resid_mid.1"], **NEAR)


def test_gradients_at_written_sites_are_with_respect_to_the_written_values(
    lm, weights, tokens
):
    sites = ("resid_mid.0", "head_out.1", "mlp_out.1")
    kinds = {"resid_mid.0": "scale", "mlp_out.1": "replace", "resid_pre.2": "apply"}
    pairs = {s: edit_pair(kind, s.split(".")[0], tokens) for s, kind in kinds.items()}
    write = {site: edit for site, (edit, _) in pairs.items()}
    edits = {site: new for site, (_, new) in pairs.items()}
    per_loss = jax.random.normal(jax.random.key(5), (ROWS, LENGTH - 1))
    run, grads = lm.gradients(tokens, sites, write=write, weights=per_loss)
    assert set(grads) == set(sites)
    oracle.assert_gradients(grads, weights, tokens, edits, per_loss)
    expected = oracle.forward(weights, tokens, edits)
    for site in sites:
        np.testing.assert_allclose(run.values[site], expected.values[site], **NEAR)
    np.testing.assert_allclose(run.losses, expected.losses, **NEAR)


def flops(lm, tokens, site):
    lowered = lm._compiled.lower(lm.params, tokens, (site,), {}, False, False)
    return lowered.compile().cost_analysis()["flops"]


def test_reading_a_layer_costs_nothing_of_the_later_ones(lm, tokens, tmp_path):
    found = [flops(lm, tokens, f"resid_post.{layer}") for layer in range(LAYERS)]
    for n in range(1, LAYERS):
        cut = oracle.write_folder(
            tmp_path / str(n), oracle.random_weights(layers=n), n_layer=n
        )
        own = flops(FlaxLM.load(str(cut)), tokens, f"resid_post.{n - 1}")
        assert found[n - 1] == pytest.approx(own, rel=0.01)
        assert found[n] > 1.4 * found[n - 1]
    mlp = 2 * tokens.size * 2 * oracle.WIDTH * oracle.WIDTHS["mlp_hidden"]
    assert flops(lm, tokens, "resid_mid.1") < found[1] - 0.9 * mlp
    assert flops(lm, tokens, "resid_pre.0") < 0.01 * found[0]


def test_new_arrays_in_edits_do_not_compile_again(lm, weights, tokens):
    traced = []

    def moved(old, by):
        traced.append(old.shape)
        return old + by

    counts = []
    for seed in (1, 2):
        where = np.random.default_rng(seed).random((ROWS, LENGTH)) < 0.5
        by = np.random.default_rng(seed).normal(size=oracle.WIDTH).astype(np.float32)
        edits = {
            "resid_pre.1": apply(moved, jnp.asarray(by), where=jnp.asarray(where)),
            "mlp_out.2": scale(seed),
        }
        with compilations("forward") as compiled:
            run = lm.run(tokens, read=("resid_post.2",), write=edits)
        plainly = {
            "resid_pre.1": lambda old, m=where, v=by: old + m[..., None] * v,
            "mlp_out.2": lambda old, by=seed: by * old,
        }
        expected = oracle.forward(weights, tokens, plainly).values["resid_post.2"]
        np.testing.assert_allclose(run.values["resid_post.2"], expected, **NEAR)
        counts.append((len(traced), len(compiled)))
    assert counts == [(1, 1), (1, 0)]


def test_an_edit_broadcasts_and_keeps_the_type_of_what_stood_there():
    old = jnp.ones((2, 3, 4), jnp.bfloat16)
    where = jnp.asarray([[True, False, False], [False, False, True]])
    row = jnp.arange(4.0)
    for edit in (replace(row), add(row - 1), scale(row)):
        new = edit(old)
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        np.testing.assert_array_equal(new, np.broadcast_to(row, old.shape))
        new = edit.replace(where=where)(old)
        np.testing.assert_array_equal(new[0, 0], row)
        np.testing.assert_array_equal(new[0, 1:], 1)


def test_bfloat16_computes_in_it_and_stays_near(folder, tokens, plain):
    low = FlaxLM.load(str(folder), dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low.params))
    run = low.run(tokens, **EVERYTHING)
    assert run.losses.dtype == jnp.float32
    for site, expected in {**plain.values, "logits": plain.logits}.items():
        found = run.logits if site == "logits" else run.values[site]
        assert found.dtype == jnp.bfloat16, site
        off = np.linalg.norm(np.asarray(found, np.float64) - expected)
        assert off < 0.03 * np.linalg.norm(expected), site


def test_no_site_depends_on_later_tokens_or_on_padding_to_the_right(
    lm, weights, tokens, plain
):
    changed = tokens.at[:, 5:].set((tokens[:, 5:] + 1) % VOCAB)
    run = lm.run(changed, **EVERYTHING)
    for site, expected in plain.values.items():
        off = np.abs(run.values[site] - expected).max(-1)
        np.testing.assert_allclose(off[:, :5], 0, atol=2e-5, err_msg=site)
        assert (off[:, 5:] > 1e-3).all()
    padded = jnp.pad(tokens, ((0, 0), (0, CONTEXT - LENGTH)))
    run = lm.run(padded, **EVERYTHING)
    values = {site: value[:, :LENGTH] for site, value in run.values.items()}
    short = run._replace(
        values=values, logits=run.logits[:, :LENGTH], losses=run.losses[:, : LENGTH - 1]
    )
    oracle.assert_same_pass(short, plain)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("resid_pots.1", "Unknown place 'resid_pots'. Did you mean 'resid_post'?"),
        ("logits", "(site='logits')"),
        ("mlp_out.3", "site='mlp_out.3' needs a layer from 0 to 2, as in 'mlp_out.0'"),
        ("mlp_out.-1", "needs a layer from 0 to 2"),
        ("mlp_out", "needs a layer from 0 to 2"),
        ("transformer.none:out", "the model has no module for transformer.none:out"),
        ("transformer.h.0:sum", "is neither 'module:in' nor 'module:out'"),
        (":out", "site=':out' is neither 'module:in' nor 'module:out'"),
    ],
)
def test_a_site_that_does_not_exist_is_refused(site, message, lm, tokens):
    for call in (
        lambda: lm.run(tokens, read=(site,)),
        lambda: lm.run(tokens, write={site: ablate()}),
        lambda: lm.gradients(tokens, (site,)),
        lambda: lm.width(site),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_tokens_longer_than_the_context_are_refused(lm):
    tokens = jnp.zeros((1, CONTEXT + 1), jnp.int32)
    for call in (lm.run, lambda tokens: lm.gradients(tokens, ("resid_pre.0",))):
        with pytest.raises(ValueError, match=r"length 13 pass the context .* is 12"):
            call(tokens)


def test_parallel_families_have_no_resid_mid_and_unknown_ones_no_places():
    with pytest.raises(ValueError, match=r"'resid_mid.0': attention and MLP .* same"):
        tap("resid_mid.0", NEOX, 2)
    assert not any("resid_mid" in site for site in site_names(NEOX, 2))
    for parallel in (True, False):
        config = SimpleNamespace(model_type="gpt_neox", use_parallel_residual=parallel)
        assert family_of(config).parallel == parallel
    with pytest.raises(ValueError, match="places of this model have no names; name a"):
        tap("resid_pre.0", family_of(SimpleNamespace(model_type="other")), 2)
    assert tap("a.b:out", None, 2) == ("a.b", "out", "")


def test_modules_that_give_several_things_are_read_by_the_first(lm, tokens, plain):
    values = lm.run(tokens, read=("transformer:out", "transformer.ln_f:out")).values
    np.testing.assert_array_equal(*values.values())
    written = {"transformer:out": ablate()}
    assert not lm.run(tokens, write=written, logits=True).logits.any()


def test_tokens_outside_the_vocabulary_are_refused(lm):
    with pytest.raises(ValueError, match=f"token {VOCAB} is outside the vocabulary"):
        lm.run(np.full((1, 2), VOCAB, np.int32), losses=True)
    with pytest.raises(ValueError, match="token -100 is outside the vocabulary"):
        lm.run(np.full((1, 2), -100, np.int32), losses=True)
