"""The PyTorch source against NumPy, against transformers' own results, and Flax."""

import copy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="the PyTorch source is NOT tested: pip install torch==2.13.0"
)

import transformers  # noqa: E402

from sae_jax.lm import torch_hooks, torch_lm  # noqa: E402
from sae_jax.lm.edits import ablate, add, apply, replace, scale  # noqa: E402
from sae_jax.lm.sites import gradient_of  # noqa: E402
from sae_jax.lm.torch_lm import TorchLM, to_jax  # noqa: E402
from sae_jax.text.blocks import Block  # noqa: E402
from tests import gpt2_oracle as oracle  # noqa: E402
from tests.gpt2_oracle import LAYERS, NEAR, PLACES, SITES, edit_pair  # noqa: E402

KINDS = ("replace", "add", "scale", "ablate", "apply")
VOCAB, WIDTH, HIDDEN, SHAPE = oracle.VOCAB, oracle.WIDTH, oracle.HIDDEN, (2, 9)
EVERYTHING = {"logits": True, "losses": True}
SIZES = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32,
)  # fmt: skip
LLAMA = dict(**SIZES, intermediate_size=HIDDEN, num_key_value_heads=2)
NEOX = dict(**SIZES, intermediate_size=HIDDEN, model_type="gpt_neox", rotary_pct=0.5)
CONFIGS = {
    "gpt2": dict(**SIZES, model_type="gpt2", n_inner=HIDDEN),
    "gpt_neo": dict(
        **SIZES, model_type="gpt_neo", intermediate_size=HIDDEN, num_layers=2,
        attention_types=[[["global", "local"], 1]], window_size=3,
    ),
    "llama": dict(**LLAMA, model_type="llama"),
    "gemma": dict(**LLAMA, model_type="gemma", head_dim=12),
    "mistral": dict(**LLAMA, model_type="mistral"),
    "qwen2": dict(**LLAMA, model_type="qwen2"),
    "parallel": dict(**NEOX, use_parallel_residual=True),
    "sequential": dict(**NEOX, use_parallel_residual=False),
    "falcon": dict(**SIZES, model_type="falcon", parallel_attn=True),
}  # fmt: skip
IN_FLAX = ("gpt2", "gpt_neo", "llama", "gemma")
FAMILIES = tuple(CONFIGS)[:-1]
# The last projections of attention and MLP: what enters is head_out and mlp_hidden.
PROJECTIONS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}
LAST_NORM = {
    "transformer.h": "transformer.ln_f",
    "gpt_neox.layers": "gpt_neox.final_layer_norm",
    "model.layers": "model.norm",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, SHAPE).astype(np.int32)


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights()


@pytest.fixture(scope="module")
def gpt2(weights, tmp_path_factory):
    folder = oracle.write_folder(tmp_path_factory.mktemp("torch"), weights)
    return TorchLM.load(str(folder))


@pytest.fixture(scope="module")
def models():
    """Random models of all kinds, in which every weight and bias matters."""
    made = {}
    for kind, fields in CONFIGS.items():
        config = transformers.AutoConfig.for_model(**fields)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                spread = 1.5 / p.shape[1] ** 0.5 if p.ndim > 1 else 0.3
                centre = p if p.ndim == 1 else 0
                p.copy_(centre + spread * torch.randn(p.shape, generator=noise))
        made[kind] = model
    return made


def where():
    return jnp.asarray(np.random.default_rng(3).random(SHAPE) < 0.5)


def same(found, expected, off):
    """The same arrays of all names, up to a part of the largest entry of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(np.asarray(found[name]) - value).max()
        assert error <= off * np.abs(value).max(), (name, error)


def everything(run):
    return {**run.values, "logits": run.logits, "losses": run.losses}


def test_every_site_and_edit_is_the_oracles(gpt2, weights, tokens):
    assert sorted(gpt2.sites) == sorted(SITES)
    assert {s: gpt2.width(s) for s in SITES} == {
        s: oracle.WIDTHS[s.split(".")[0]] for s in SITES
    }
    assert (gpt2.n_layers, gpt2.context) == (LAYERS, oracle.CONTEXT)
    found = gpt2.run(tokens, read=SITES, **EVERYTHING)
    oracle.assert_same_pass(found, oracle.forward(weights, tokens))
    for place in PLACES:
        for kind in KINDS:
            for layer, at in ((1, None), (LAYERS - 1, where())):
                edit, new = edit_pair(kind, place, tokens, at)
                site = f"{place}.{layer}"
                expected = oracle.forward(weights, tokens, {site: new})
                found = gpt2.run(tokens, read=SITES, write={site: edit}, **EVERYTHING)
                oracle.assert_same_pass(found, expected)


def test_gradients_are_the_oracles(gpt2, weights, tokens):
    _, grads = gpt2.gradients(tokens, SITES)
    oracle.assert_gradients(grads, weights, tokens)
    _, alone = gpt2.gradients(tokens, ["resid_pre.1"])
    np.testing.assert_allclose(alone["resid_pre.1"], grads["resid_pre.1"], **NEAR)
    kinds = {
        "resid_mid.0": "scale", "resid_pre.1": "add", "head_out.1": "apply",
        "mlp_out.1": "replace", "resid_mid.1": "apply", "mlp_hidden.2": "ablate",
    }  # fmt: skip
    pairs = {
        s: edit_pair(k, s.split(".")[0], tokens, where()) for s, k in kinds.items()
    }
    write = {site: edit for site, (edit, _) in pairs.items()}
    per_loss = np.random.default_rng(5).normal(size=(2, 8)).astype(np.float32)
    run, grads = gpt2.gradients(tokens, SITES, write=write, weights=per_loss)
    edits = {site: new for site, (_, new) in pairs.items()}
    oracle.assert_gradients(grads, weights, tokens, edits, per_loss)
    expected = oracle.forward(weights, tokens, edits)
    oracle.assert_same_pass(run._replace(logits=expected.logits), expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_sites_are_where_transformers_says(kind, models, tokens):
    model = models[kind]
    lm = TorchLM(kind, model)
    inputs = torch.from_numpy(tokens).long()
    with torch.no_grad():
        own = model(inputs, labels=inputs, output_hidden_states=True, use_cache=False)
    assert len(lm.sites) == 2 * (6 if kind == "parallel" else 7)
    last_norm = f"{LAST_NORM[lm.family.block]}:out"
    read = [*lm.sites, last_norm]
    run = lm.run(jnp.asarray(tokens), read=read, logits=True, losses=True)
    np.testing.assert_array_equal(run.logits, own.logits)
    np.testing.assert_allclose(run.losses.mean(), own.loss.detach(), rtol=1e-6)
    v = run.values
    for site, expected in zip(
        ("resid_pre.0", "resid_post.0", "resid_pre.1", last_norm),
        own.hidden_states[:2] + own.hidden_states[1:],
        strict=True,
    ):
        np.testing.assert_array_equal(v[site], expected, err_msg=site)
    for i in range(2):
        mid = v[f"resid_pre.{i}"] + v[f"attn_out.{i}"]
        if kind != "parallel":
            np.testing.assert_allclose(v[f"resid_mid.{i}"], mid, rtol=0, atol=1e-6)
        post = mid + v[f"mlp_out.{i}"]
        np.testing.assert_allclose(v[f"resid_post.{i}"], post, rtol=0, atol=3e-6)
        after_heads, after_hidden = PROJECTIONS.get(
            lm.config.model_type, ("self_attn.o_proj", "mlp.down_proj")
        )
        for name, entered, left in (
            (after_heads, "head_out", "attn_out"),
            (after_hidden, "mlp_hidden", "mlp_out"),
        ):
            module = model.get_submodule(f"{lm.family.block}.{i}.{name}")
            weight = module.weight.detach().numpy()
            weight = weight.T if isinstance(module, torch.nn.Linear) else weight
            bias = 0 if module.bias is None else module.bias.detach().numpy()
            expected = np.asarray(v[f"{entered}.{i}"], np.float64) @ weight + bias
            np.testing.assert_allclose(v[f"{left}.{i}"], expected, **NEAR)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.usefixtures("x64")
def test_gradients_are_differences_of_losses(kind, models, tokens):
    """In float64, along a random direction at every site, with edits in the way."""
    lm = TorchLM(kind, copy.deepcopy(models[kind]).double())
    rng = np.random.default_rng(7)
    write = {
        "resid_pre.1": apply(jnp.tanh),
        "mlp_out.0": add(jnp.asarray(rng.normal(size=WIDTH))),
        "head_out.1": scale(2),
    }
    run, grads = lm.gradients(tokens, lm.sites, write=write)
    # The norms of Llama's kin and GPT-Neo's attention always compute in float32.
    off = 1e-6 if kind in ("gpt2", "parallel", "sequential") else 2e-4
    for site in lm.sites:
        direction = rng.normal(size=grads[site].shape)
        direction /= np.linalg.norm(direction)

        def loss(step, site=site, direction=direction):
            moved = replace(run.values[site] + step * direction)
            logits = lm.run(tokens, write={**write, site: moved}, logits=True).logits
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).sum()

        one, two = (loss(h) - loss(-h) for h in (0.01, 0.02))
        np.testing.assert_allclose(
            (grads[site] * direction).sum(),
            (8 * one - two) / 0.12,
            rtol=0,
            atol=off * np.linalg.norm(grads[site]),
            err_msg=site,
        )
    assert all(p.grad is None for p in lm.model.parameters())


@pytest.fixture(scope="module", params=IN_FLAX)
def both(request, models, tmp_path_factory):
    # Here, so that the rest of this file also runs with transformers 5, without Flax.
    from sae_jax.lm.flax_lm import FlaxLM

    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    models[kind].save_pretrained(folder)
    off = 2e-6 if kind == "gpt2" else 1e-5  # twice what rounding was seen to make
    return TorchLM.load(str(folder)), FlaxLM.load(str(folder)), off


def edit_of(kind, width, at):
    rows = jax.random.normal(jax.random.key(8), (*SHAPE, width))
    make, args = {
        "replace": (replace, (rows,)),
        "add": (add, (rows[0, 0],)),
        "scale": (scale, (-1.5,)),
        "ablate": (ablate, ()),
        "apply": (apply, (oracle.squashed, 2.0, rows[1])),
    }[kind]
    return make(*args, where=at)


def test_flax_and_torch_give_the_same(both, tokens):
    mine, flax, off = both
    assert mine.sites == flax.sites
    assert [mine.width(s) for s in mine.sites] == [flax.width(s) for s in flax.sites]
    writes = [{}]
    # Two places at a time, one in each layer.
    for first, second in zip(PLACES[:4], PLACES[:2:-1], strict=True):
        pair = (f"{first}.0", f"{second}.1")
        for kind in KINDS:
            for at in (None, where()):
                writes.append({s: edit_of(kind, mine.width(s), at) for s in pair})
    for write in writes:
        asked = {"read": mine.sites, "write": write, **EVERYTHING}
        # Op by op: every one of these would be a program of its own.
        theirs = flax.forward(flax.params, jnp.asarray(tokens), **asked)
        same(everything(mine.run(tokens, **asked)), everything(theirs), off)


def test_flax_and_torch_give_the_same_gradients(both, tokens):
    mine, flax, off = both
    row = jax.random.normal(jax.random.key(9), (WIDTH,))
    per_loss = jax.random.normal(jax.random.key(5), (2, 8))
    write = {
        "resid_mid.0": apply(oracle.squashed, 2.0, row, where=where()),
        "mlp_hidden.0": scale(0.5),
        "resid_pre.1": add(row),
        "head_out.1": ablate(where=where()),
        "mlp_out.1": replace(row, where=where()),
    }
    for options in ({}, {"write": write, "weights": per_loss}):
        run, grads = mine.gradients(tokens, mine.sites, **options)
        theirs, flax_grads = flax.gradients(jnp.asarray(tokens), flax.sites, **options)
        same(grads, flax_grads, off)
        same(run.values, theirs.values, off)
        np.testing.assert_allclose(run.losses, theirs.losses, **NEAR)
    assert mine.gradients(tokens, ())[1] == {}


def test_rows_and_their_gradients_are_harvested_alike(both):
    """Of contexts of several lengths, in several passes."""
    from sae_jax.activations import Harvester

    mine, flax, off = both
    rng = np.random.default_rng(4)
    real = np.arange(9) < np.array([[9], [5], [7]])
    tokens = np.where(real, rng.integers(VOCAB, size=(3, 9)), 0)
    places = np.nonzero(real & (np.arange(9) > 0))
    block = Block(tokens, real, *places, place=None, after=None)
    sites = "resid_pre.1", "mlp_hidden.0"
    found, expected = (
        Harvester(lm, sites, contexts_per_pass=2, gradients=sites[:1]).rows(block)
        for lm in (mine, flax)
    )
    assert {*found} == {*sites, gradient_of(sites[0])}
    same(found, expected, off)


def ran(model, act):
    """The modules that `act` ran, to their end or not."""
    names = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
    ]
    act()
    for hook in hooks:
        hook.remove()
    return names


def test_nothing_runs_behind_the_last_site(models, tokens):
    lm = TorchLM("llama", models["llama"])
    for site, last in {
        "resid_pre.0": "model.layers.0",
        "head_out.0": "model.layers.0.self_attn.o_proj",
        "resid_mid.0": "model.layers.0.self_attn.o_proj",
        "mlp_out.0": "model.layers.0.mlp.down_proj",
        "resid_pre.1": "model.layers.1",
    }.items():
        for asked in ({"read": [site]}, {"write": {site: ablate()}}):
            assert ran(lm.model, lambda a=asked: lm.run(tokens, **a))[-1] == last
        full = ran(lm.model, lambda s=site: lm.run(tokens, read=[s], losses=True))
        assert full[-1] == "lm_head"


def hooks_on(model):
    """How many hooks are ours; transformers 5 has some of its own."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
        )
    ]
    return sum(getattr(h, "func", h).__module__ == torch_hooks.__name__ for h in hooks)


def test_hooks_never_stay(models, tokens):
    lm = TorchLM("gpt2", models["gpt2"])
    misshapen = {"mlp_out.1": replace(jnp.ones(3))}
    never = ["transformer.h:out"]  # a list of modules, which is not called itself
    seen = apply(lambda old: counts.append(hooks_on(lm.model)) or old)
    counts: list[int] = []
    lm.run(tokens, write={"mlp_out.1": seen})
    assert counts == [2]
    for refused in (
        lambda: lm.run(tokens, read=["resid_pre.0"], write=misshapen, losses=True),
        lambda: lm.gradients(tokens, ["resid_pre.0"], write=misshapen),
        lambda: lm.run(tokens, read=never),
        lambda: lm.gradients(tokens, never),
        lambda: lm.run(tokens, read=["transformer.none:in"]),
    ):
        with pytest.raises(ValueError, match=r"broadcast|never calls it"):
            refused()
        assert hooks_on(lm.model) == 0
    lm.run(tokens, read=["resid_mid.0"])
    lm.gradients(tokens, ["resid_mid.0"])
    assert hooks_on(lm.model) == 0


def test_memory_is_shared_with_jax(models, tokens):
    lm = TorchLM("gpt2", models["gpt2"])
    kept = {}
    for name in ("transformer.h.0", "transformer.h.1.attn", "lm_head"):
        module = lm.model.get_submodule(name)

        def keep(module, args, result, name=name):
            kept[name] = result[0] if isinstance(result, tuple) else result

        hook = module.register_forward_hook(keep)
        run = lm.run(tokens, read=["resid_post.0", "attn_out.1"], logits=True)
        hook.remove()
        mine = [*run.values.values(), run.logits]
        at = {"transformer.h.0": 0, "transformer.h.1.attn": 1, "lm_head": 2}[name]
        assert mine[at].unsafe_buffer_pointer() == kept[name].data_ptr()
    odd = torch.randn(65, dtype=torch.bfloat16)[1:]
    for value in (odd, odd.view(8, 8).T, odd.expand(3, 64), odd.view(8, 8)[:, 2:4]):
        np.testing.assert_array_equal(to_jax(value).astype(jnp.float32), value.float())
        assert to_jax(value).dtype == jnp.bfloat16


def test_models_that_write_in_place_spoil_nothing(models, tokens):
    """Falcon adds the attention's output into the memory of the MLP's."""
    lm = TorchLM("falcon", models["falcon"])
    mlp, attention = "transformer.h.0.mlp:out", "transformer.h.0.self_attention:out"
    before = lm.run(tokens, read=[mlp, attention])  # ends before Falcon adds
    after = lm.run(tokens, read=[mlp, attention], logits=True)
    for site in (mlp, attention):
        np.testing.assert_array_equal(after.values[site], before.values[site])
    value = jnp.ones((*SHAPE, WIDTH))
    written = lm.run(tokens, read=[mlp], write={mlp: replace(value)}, losses=True)
    np.testing.assert_array_equal(written.values[mlp], 1)
    np.testing.assert_array_equal(value, 1)
    run, grads = lm.gradients(tokens, [mlp, attention], write={mlp: add(value)})
    np.testing.assert_allclose(grads[mlp], grads[attention], **NEAR)
    np.testing.assert_array_equal(run.values[mlp], before.values[mlp] + 1)
    with pytest.raises(ValueError, match="places of this model have no names"):
        lm.run(tokens, read=["resid_pre.0"])


def test_any_module_by_path_also_if_called_by_keyword(models, tokens):
    lm = TorchLM("llama", models["llama"])
    block = "model.layers.1"
    norm, attention = f"{block}.input_layernorm:out", f"{block}.self_attn:in"
    calls = []
    watch = lm.model.get_submodule(f"{block}.self_attn")
    hook = watch.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, set(kwargs))), with_kwargs=True
    )
    run = lm.run(tokens, read=[norm, attention], losses=True)
    hook.remove()
    assert calls[0][0] == ()
    assert "hidden_states" in calls[0][1]
    np.testing.assert_array_equal(run.values[norm], run.values[attention])
    twice = [
        lm.run(tokens, write={s: scale(2)}, losses=True) for s in (norm, attention)
    ]
    np.testing.assert_array_equal(twice[0].losses, twice[1].losses)
    assert np.abs(twice[0].losses - run.losses).max() > 0.1
    # A module whose result is a record, of which the first entry is meant.
    last = {"model.norm:out": scale(2)}
    whole = lm.run(
        tokens, read=["model:out"], write={"model:out": scale(2)}, logits=True
    )
    run = lm.run(tokens, read=["model.norm:out"], write=last, logits=True)
    np.testing.assert_array_equal(whole.logits, run.logits)
    np.testing.assert_array_equal(*whole.values.values(), *run.values.values())


def test_passes_work_whatever_the_grad_mode_and_length(gpt2, tokens):
    expected = gpt2.run(tokens, read=SITES, losses=True)
    _, grads = gpt2.gradients(tokens, SITES)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            again = gpt2.run(tokens, read=SITES, losses=True)
            same(again.values, expected.values, off=0)
            _, again = gpt2.gradients(tokens, SITES)
            np.testing.assert_array_equal(again["head_out.1"], grads["head_out.1"])
    run, none = gpt2.gradients(tokens[:, :1], ["mlp_out.0"])
    assert run.losses.shape == (2, 0)
    assert not none["mlp_out.0"].any()


def test_bfloat16_computes_in_it_and_stays_near(weights, tokens, tmp_path):
    oracle.write_folder(tmp_path, weights)
    low = TorchLM.load(str(tmp_path), dtype="bfloat16")
    write = {"resid_pre.1": add(jnp.ones(WIDTH))}
    run = low.run(tokens, read=SITES, write=write, **EVERYTHING)
    expected = oracle.forward(weights, tokens, {"resid_pre.1": lambda old: old + 1})
    for site, value in {**expected.values, "logits": expected.logits}.items():
        found = run.logits if site == "logits" else run.values[site]
        assert found.dtype == jnp.bfloat16, site
        off = np.linalg.norm(np.asarray(found, np.float64) - value)
        assert off < 0.03 * np.linalg.norm(value), site
    assert run.losses.dtype == jnp.float32
    _, grads = low.gradients(tokens, SITES, write=write)
    assert {g.dtype for g in grads.values()} == {jnp.dtype(jnp.bfloat16)}


def test_what_cannot_be_run_is_refused(models, gpt2, tokens, as_users):
    long = np.zeros((1, oracle.CONTEXT + 1), np.int32)
    with pytest.raises(ValueError, match=r"length 13 pass the context .* is 12"):
        gpt2.run(long)
    with pytest.raises(
        ValueError, match=r"token 1\d\d is outside the vocabulary .* 64"
    ):
        gpt2.run(tokens + VOCAB)
    with pytest.raises(TypeError, match=r"float32.* to .*int64"):
        gpt2.run(tokens.astype(np.float32))
    training = TorchLM("mine", copy.deepcopy(models["gpt2"]).train())
    with pytest.raises(ValueError, match=r"'mine' trains .dropout.: call model.eval"):
        training.gradients(tokens, ["resid_pre.0"])
    assert not gpt2.model.training
    assert not any(p.requires_grad for p in gpt2.model.parameters())


def test_folders_that_do_not_fit_are_refused(weights, tmp_path, monkeypatch):
    def load(weights, **config):
        oracle.write_folder(tmp_path, weights, **config)
        return TorchLM.load(str(tmp_path))

    assert load(weights).fingerprint == load(weights).fingerprint
    other = {**weights, "ln_f.bias": weights["ln_f.bias"] + 1}
    assert load(weights).fingerprint != load(other).fingerprint
    load({**weights, "h.0.attn.masked_bias": np.zeros(())})
    less = {k: v for k, v in weights.items() if k != "h.1.mlp.c_fc.bias"}
    with pytest.raises(
        ValueError, match=r"do not fit.*Missing: .*h\.1\.mlp\.c_fc\.bias"
    ):
        load(less)
    with pytest.raises(ValueError, match=r"do not fit.*Not known: .*h\.2\.attn"):
        load(weights, n_layer=2)
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded .*mismatch"):
        load({**weights, "ln_f.bias": np.zeros(3)})
    with pytest.raises(
        ValueError, match=r"cannot be loaded .code of its own is never run"
    ):
        load(weights, model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})
    load(weights)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match="cannot be loaded"):
        TorchLM.load(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"needs config.json and model.safetens"
    ):
        TorchLM.load(str(tmp_path))
    monkeypatch.setattr(torch_lm, "model_folder", lambda name: tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"absent needs config.json"):
        TorchLM.load("embedded")


def test_without_pytorch_one_clear_error():
    code = """
import sys
sys.modules["torch"] = None
import sae_jax.lm.edits, sae_jax.lm.files, sae_jax.lm.sites
import sae_jax.lm.torch_lm
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "ImportError: TorchLM needs PyTorch: pip install 'sae_jax[torch]'"
    assert done.stderr.splitlines()[-1] == message
