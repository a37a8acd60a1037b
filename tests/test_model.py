"""The SAE itself: starts, treatments, transcoders, codes in both forms, messages."""

import copy
import dataclasses
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import SAE, Sparse, codes, fold_scale, products, select, to_dense
from sae_jax.binding import bind
from sae_jax.start import geometric_median
from tests.contract import rows

KEY = jax.random.key(0)


def test_start_has_unit_decoder_rows_and_a_tied_encoder():
    params = SAE(16, 64, rule="relu").init(KEY).params
    np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(params["W_enc"], params["W_dec"])
    assert not params["b_enc"].any()
    assert not params["b_dec"].any()


@pytest.mark.parametrize("start", ["mean", "geometric_median"])
def test_b_dec_starts_from_a_sample_in_the_treated_space(start):
    sample = rows(1, 500) + 3
    sae = SAE(16, 64, rule="relu", b_dec_start=start, treatment="scale")
    variables = sae.init(KEY, sample=sample)
    treated = sample * variables.constants["scale_in"]
    expected = treated.mean(0) if start == "mean" else geometric_median(treated)
    np.testing.assert_allclose(variables.params["b_dec"], expected, rtol=1e-5)


def test_scale_brings_the_mean_norm_to_the_root_of_the_width():
    sample = 7 * rows(2, 500)
    constant = (
        SAE(16, 64, rule="relu", treatment="scale").init(KEY, sample=sample).constants
    )
    norms = jnp.linalg.norm(sample * constant["scale_in"], axis=1)
    np.testing.assert_allclose(norms.mean(), 4, rtol=1e-5)


@pytest.mark.parametrize("treatment", ["none", "standardise", "scale"])
def test_apply_is_decode_of_encode(treatment):
    sae = SAE(16, 64, rule="topk(k=5)", treatment=treatment)
    variables = sae.init(KEY, sample=rows(1))
    x = rows()
    out = sae.apply(variables, x)
    active = sae.encode(variables, x)
    np.testing.assert_array_equal(to_dense(out.codes), to_dense(active))
    np.testing.assert_allclose(
        sae.decode(variables, active, like=x), out.x_hat, rtol=1e-5, atol=1e-5
    )


def test_standardised_rows_come_back_in_their_own_units():
    """An SAE that reconstructs perfectly gives the input back, whatever its scale."""
    sae = SAE(8, 16, rule="relu", treatment="standardise")
    eye = jnp.eye(8)
    params = sae.init(KEY).params
    params = {
        **params,
        "W_enc": jnp.concatenate([eye, -eye]),
        "W_dec": jnp.concatenate([eye, -eye]),
    }
    x = 40 * rows(3, 9, 8) - 13
    x_hat = sae.apply(sae.init(KEY)._replace(params=params), x).x_hat
    np.testing.assert_allclose(x_hat, x, rtol=1e-4, atol=1e-2)  # std against std + 1e-5


def test_transcoder_folds_both_scales():
    sae = SAE(16, 64, rule="topk(k=5)", d_out=12, treatment="scale")
    variables = sae.init(KEY, sample=rows(1), target_sample=9 * rows(2, width=12))
    plain, folded = fold_scale(sae, variables)
    assert plain.treatment == "none"
    before, after = sae.apply(variables, rows()), plain.apply(folded, rows())
    np.testing.assert_allclose(before.x_hat, after.x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("treatment", ["scale", "standardise"])
def test_gradients_of_the_model_are_scaled_with_the_input(treatment):
    """By what a change of the treated row does to the row that is put back."""
    seen = []

    def look(inputs, *, k: int = 4):
        seen.append((inputs.x, inputs.grad_x))
        return select.rows(inputs.pre, k, count_max=k)

    rule = sae_jax.Rule(
        name="look",
        paper="none",
        decides="nothing",
        encode=sae_jax.from_selection(look),
        example={"k": 4},
        knob="k",
    )
    sae = SAE(16, 64, rule=bind(rule, {}), treatment=treatment)
    variables = sae.init(KEY, sample=10 * rows(1))
    out = sae.forward(variables, rows(), grad_x=rows(4))
    (x, grad_x) = seen[0]
    assert abs(x[0, 0] - rows()[0, 0]) > 0.01
    # Of a loss whose gradient is rows(4), where the reconstruction is spliced in.
    expected = jax.grad(lambda z: (out.undo(z) * rows(4)).sum())(x)
    np.testing.assert_allclose(grad_x, expected, rtol=1e-5)
    if treatment == "scale":
        np.testing.assert_allclose(x * grad_x, rows() * rows(4), rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "below", "form"),
    [("topk", 0, jax.Array), ("topk", 1.0, Sparse), ("batch_topk", 1.0, codes.Pairs)],
)
def test_functions_of_codes_take_all_forms(rule, below, form, monkeypatch):
    monkeypatch.setattr(select, "SPARSE_BELOW", below)
    sae = SAE(16, 64, rule=f"{rule}(k=5)")
    variables = sae.init(KEY)
    active = sae.forward(variables, rows(), train=True).codes
    assert isinstance(active, form)
    dense = np.asarray(to_dense(active))
    W_dec = variables.params["W_dec"]
    mask = jnp.arange(24) < 7
    np.testing.assert_array_equal(codes.l0(active), (dense != 0).sum(1))
    np.testing.assert_allclose(codes.norm(active), np.linalg.norm(dense, axis=1), 1e-6)
    np.testing.assert_array_equal(codes.fired(active, None), (dense != 0).any(0))
    np.testing.assert_array_equal(codes.fired(active, mask), (dense[:7] != 0).any(0))
    np.testing.assert_array_equal(codes.counts(active, mask), (dense[:7] != 0).sum(0))
    np.testing.assert_allclose(codes.strengths(active).sum(1), dense.sum(1), 1e-6)
    assert codes.entries(codes.astype(active, jnp.bfloat16)).dtype == jnp.bfloat16
    x_hat = products.decode(active, W_dec, jnp.float32)
    np.testing.assert_allclose(x_hat, dense @ np.asarray(W_dec), atol=1e-5)
    part = dense[:, 10:30] @ np.asarray(W_dec)[10:30]
    _, found, _ = products.decode_slices(active, W_dec, [10, 30, 64], jnp.float32)
    np.testing.assert_allclose(found, part, atol=1e-5)


def test_norm_of_a_zero_code_has_gradient_zero():
    grad = jax.grad(lambda active: codes.norm(active).sum())(jnp.zeros((2, 5)))
    np.testing.assert_array_equal(grad, 0)


def test_bfloat16_rounds_operands_only():
    """bfloat16 operands of float32 sums: near float32, not equal, and not worse."""
    wide = SAE(256, 512, rule="relu")
    narrow = dataclasses.replace(wide, dtype="bfloat16")
    variables = wide.init(KEY)
    x = rows(5, 32, 256)
    a, b = wide.apply(variables, x).x_hat, narrow.apply(variables, x).x_hat
    error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
    assert 1e-4 < error < 1e-2
    assert all(p.dtype == jnp.float32 for p in variables.params.values())


def test_description_is_hashable_readable_and_picklable():
    sae = SAE(16, 64, rule="topk(k=5)", treatment="scale")
    assert repr(sae) == (
        "SAE(d_in=16, n_features=64, treatment='scale', rule='topk(k=5)')"
    )
    assert eval(repr(sae), {"SAE": SAE}) == sae
    assert hash(sae) == hash(SAE(16, 64, rule="topk(k=5)", treatment="scale"))
    assert sae != SAE(16, 64, rule="topk(k=6)", treatment="scale")
    for other in (sae, sae.up_to(9)):
        assert pickle.loads(pickle.dumps(other)) == other == copy.deepcopy(other)


BAD_SAES = {
    "d_in=0": dict(d_in=0),
    "n_features=-4 must be": dict(n_features=-4),
    "n_features=1.5 must be an integer": dict(n_features=1.5),
    "k=65 must be above 0 and at most n_features=64": dict(rule="topk(k=65)"),
    "k=0 must be above 0": dict(rule="topk(k=0)"),
    "k=-1 must be finite and not negative": dict(rule="topk(k=-1)"),
    "coef=nan must be a number|Cannot read|not a literal": dict(rule="relu(coef=nan)"),
    "Did you mean 'topk'": dict(rule="topkk(k=3)"),
    "Unknown argument 'kk'. Did you mean 'k'": dict(rule="topk(kk=3)"),
    "need names": dict(rule="topk(3)"),
    "0.03125 for 1/32": dict(rule="top_afa(coef=1/32)"),
    "not a literal": dict(rule="topk(k=__import__('os').getpid())"),
    "how='near' must be one of 'nearest', 'exceed'": dict(rule="top_afa(how='near')"),
    "must rise to 1.0": dict(rule="matryoshka(k=4.0, prefixes=[0.5, 0.25, 1.0])"),
    "treatment='unit' must be one of": dict(treatment="unit"),
    "reads the vector that it reconstructs": dict(rule="top_afa", d_out=12),
    "does not know for its target": dict(
        rule="topk(k=2)", d_out=12, treatment="standardise"
    ),
    "centre=True subtracts b_dec": dict(rule="topk(k=2)", d_out=12, centre=True),
    "jax_enable_x64": dict(dtype="float64"),
    "k stands twice": dict(rule="topk(k=3, k=4)"),
    "is not a literal; write the value": dict(rule="topk(k={[1]: 2})"),
    "rule=None must be a spec string": dict(rule=None),
    "needs rows wider than 1": dict(d_in=1, treatment="standardise"),
    "bandwidth=0 gives thresholds no gradient": dict(rule="jump_relu(bandwidth=0)"),
}


@pytest.mark.parametrize("message", BAD_SAES)
@pytest.mark.usefixtures("as_users")
def test_a_bad_description_is_refused_with_the_remedy(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SAE(**{"d_in": 16, "n_features": 64, "rule": "relu", **BAD_SAES[message]})


@pytest.mark.usefixtures("as_users")
def test_all_faults_are_reported_at_once():
    with pytest.raises(ValueError, match=r"(?s)d_in.*treatment.*Unknown argument"):
        SAE(-1, 64, rule="topk(j=3)", treatment="unit")


BAD_ROWS = {
    r"x has shape \(24, 15\); needed is \[rows, 16\]": lambda: rows(0, 24, 15),
    r"x has shape \(16,\)": lambda: rows()[0],
    "x has no rows": lambda: rows()[:0],
    "x holds int32; activations are floats": lambda: jnp.ones((24, 16), int),
    "NaN or infinite values in 2 of 24 rows": lambda: (
        rows().at[3, 4].set(jnp.nan).at[5, 1].set(jnp.inf)
    ),
    r"x is a list; give an array of shape \[rows, 16\]": lambda: [[0.0] * 16],
}


@pytest.mark.parametrize("message", BAD_ROWS)
@pytest.mark.usefixtures("as_users")
def test_bad_rows_are_refused_with_the_remedy(message):
    sae = SAE(16, 64, rule="topk(k=5)")
    variables = sae.init(KEY)
    with pytest.raises(ValueError, match=message):
        sae.forward(variables, BAD_ROWS[message]())


def refuses(message, rule="topk(k=5)", options=None, **inputs):
    sae = SAE(16, 64, rule=rule, **(options or {}))
    with pytest.raises(ValueError, match=message):
        sae.forward(sae.init(KEY), rows(), **inputs)


@pytest.mark.usefixtures("as_users")
def test_bad_company_is_refused_with_the_remedy():
    refuses("mask is float32", mask=jnp.ones(24))
    refuses(r"mask is a list; needed is bool\[24\]", mask=[True] * 24)
    refuses(r"needed is bool\[24\]", mask=jnp.ones(5, bool))
    refuses("takes no target", target=rows())
    refuses("trains on a target", options={"d_out": 12}, train=True)
    refuses("match them", options={"d_out": 12}, target=rows(0, 3, 12))
    refuses("give the batch a 'grad'", rule="gradient_topk(k=4)", train=True)
    refuses("pass a key", rule="variational(k=4)", train=True)


def test_data_dependent_starts_ask_for_data():
    with pytest.raises(ValueError, match=r"estimated from data: pass init\(key"):
        SAE(16, 64, rule="relu", treatment="scale").init(KEY)
    with pytest.raises(ValueError, match="they tell no scale"):
        SAE(16, 64, rule="relu", treatment="scale").init(KEY, sample=0 * rows())
    with pytest.raises(ValueError, match="sample and target_sample"):
        SAE(16, 64, rule="relu", d_out=12, b_dec_start="mean").init(KEY, sample=rows())


def test_standardise_decodes_only_with_the_rows_it_came_from():
    sae = SAE(16, 64, rule="relu", treatment="standardise")
    variables = sae.init(KEY)
    with pytest.raises(ValueError, match=r"needs decode\(\.\.\., like=x\)"):
        sae.decode(variables, sae.encode(variables, rows()))


def test_variables_of_another_sae_are_refused():
    small, large = SAE(16, 32, rule="topk(k=2)"), SAE(16, 64, rule="topk(k=2)")
    with pytest.raises(ValueError, match=r"W_enc has shape \(32, 16\), this SAE needs"):
        large.encode(small.init(KEY), rows())


def test_a_knob_above_its_ceiling_is_refused():
    sae = SAE(16, 64, rule="topk(k=4)")
    variables = sae.init(KEY)
    l0 = [sae.forward(variables, rows(), knob=k).codes for k in (2, 4)]
    assert [int((c != 0).sum(1).max()) for c in map(to_dense, l0)] == [2, 4]
    with pytest.raises(ValueError, match=r"knob=8 is above 4; see SAE\.up_to"):
        sae.forward(variables, rows(), knob=8)
    more = sae.up_to(8).forward(variables, rows(), knob=8).codes
    assert (to_dense(more) != 0).sum(1).max() == 8


def test_a_knob_reaches_every_function_of_its_rule():
    """A rule whose weights depend on the knob."""

    def weights(params, state, *, level: float | jax.Array = 0.5):
        plain = sae_jax.Weights(*(params[n] for n in sae_jax.Weights._fields))
        return plain._replace(b_enc=plain.b_enc - level)

    rule = sae_jax.Rule(
        name="levelled",
        paper="none",
        decides="a level",
        encode=sae_jax.from_pre(jax.nn.relu),
        weights=weights,
        example={},
        knob="level",
    )
    sae = SAE(16, 64, rule=rule)
    variables = sae.init(KEY)
    sizes = [
        to_dense(sae.up_to(9).forward(variables, rows(), knob=level).codes).sum()
        for level in (0.5, 3.0)
    ]
    assert sizes[1] < 0.5 * sizes[0]


def test_gates_do_without_their_bias_when_told_to():
    sae = SAE(16, 64, rule="gated", encoder_bias=False)
    variables = sae.init(KEY)
    shifted = {**variables.params, "b_enc": jnp.full(64, -5.0)}
    before = sae.apply(variables, rows())
    after = sae.apply(variables._replace(params=shifted), rows())
    np.testing.assert_array_equal(before.codes, after.codes)


def test_evaluating_a_transcoder_leaves_the_target_open():
    sae = SAE(16, 64, rule="gated", d_out=12)
    assert sae.forward(sae.init(KEY), rows()).target is None


def test_flat_rows_have_gradients_under_standardise():
    sae = SAE(16, 64, rule="relu", treatment="standardise")
    variables = sae.init(KEY)
    x = rows().at[3].set(0.0)
    grad = jax.grad(lambda x: jnp.square(sae.apply(variables, x).x_hat).sum())(x)
    assert jnp.isfinite(grad).all()
    assert (grad[0] != 0).any()


def test_only_constants_fold():
    sae = SAE(16, 64, rule="relu")
    with pytest.raises(ValueError, match="no constant to fold"):
        fold_scale(sae, sae.init(KEY))


def test_public_names_are_the_documented_ones():
    # Modules apart, which Python adds to a package when they are imported.
    public = {
        name
        for name, value in vars(sae_jax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= set(sae_jax.__all__) <= set(dir(sae_jax))
    for name in sae_jax.__all__:
        assert getattr(sae_jax, name).__doc__, name
