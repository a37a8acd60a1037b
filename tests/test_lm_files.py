"""Language models from files: what is read, what is refused, and the other families."""

import fnmatch
import json
import re
import socket
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize

from sae_jax.lm.edits import scale
from sae_jax.lm.files import model_folder
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.lm.flax_weights import load_config
from tests import gpt2_oracle as oracle
from tests.gpt2_oracle import BUFFERS, NEAR, RAW, VOCAB, prefixed

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 9), np.int32))
WEIGHTS = oracle.random_weights()
HEAD = oracle.random_weights(9)["wte.weight"]
# What does not hold yet.


def rounded(dtype):
    return {name: jnp.asarray(value, dtype) for name, value in WEIGHTS.items()}


def assert_oracles(logits, weights):
    np.testing.assert_allclose(logits, oracle.forward(weights, TOKENS).logits, **NEAR)


def loaded_as_the_oracle(folder, weights):
    lm = FlaxLM.load(str(folder))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(lm.params))
    assert_oracles(lm.forward(lm.params, TOKENS, logits=True).logits, weights)
    return lm.params


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = oracle.write_folder(tmp_path_factory.mktemp("lm"), WEIGHTS)
    return FlaxLM.load(str(folder)).params


TENSORS = {
    "bare": WEIGHTS,
    "with the prefix": prefixed(WEIGHTS),
    "with the buffers": WEIGHTS | BUFFERS,
    "with both": prefixed(WEIGHTS | BUFFERS),
    "with the tied head": prefixed(WEIGHTS) | {"lm_head.weight": WEIGHTS["wte.weight"]},
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", TENSORS)
def test_pytorch_names_load_as_the_oracle_has_them(name, shards, reference, tmp_path):
    folder = oracle.write_folder(tmp_path, TENSORS[name], shards=shards)
    assert (folder / "model.safetensors").exists() == (shards == 1)
    oracle.assert_same_params(loaded_as_the_oracle(folder, WEIGHTS), reference)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_float_type_loads_as_float32_from_both_formats(dtype, reference, tmp_path):
    folder = oracle.write_folder(tmp_path, rounded(dtype))
    loaded_as_the_oracle(folder, rounded(dtype))
    params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype)), reference)
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(params))
    oracle.assert_same_params(FlaxLM.load(str(folder)).params, params)


def test_an_untied_head_is_read_and_missed(tmp_path):
    weights = WEIGHTS | {"lm_head.weight": HEAD}
    folder = oracle.write_folder(tmp_path, weights, tie_word_embeddings=False)
    loaded_as_the_oracle(folder, weights)
    oracle.write_folder(tmp_path, WEIGHTS, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"Missing: lm_head\.kernel"):
        FlaxLM.load(str(folder))


def test_files_load_without_torch(tmp_path):
    folder = oracle.write_folder(tmp_path, rounded("bfloat16"))
    np.save(folder / "tokens.npy", TOKENS)
    code = """if True:
        import sys
        sys.modules["torch"] = None
        import jax.numpy as jnp, numpy as np
        from sae_jax.lm.flax_lm import FlaxLM
        lm = FlaxLM.load(sys.argv[1])
        tokens = jnp.asarray(np.load(sys.argv[1] + "/tokens.npy"))
        np.save(sys.argv[1] + "/logits.npy", lm.run(tokens, logits=True).logits)
    """
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_oracles(np.load(folder / "logits.npy"), rounded("bfloat16"))


LESS = {name: x for name, x in WEIGHTS.items() if name != "h.1.ln_2.bias"}
FC = "h.0.mlp.c_fc.weight"
MISFITS = [
    (LESS, "Missing: transformer.h.1.ln_2.bias. Not known: none"),
    (WEIGHTS | {"h.0.attn.extra": HEAD}, "Not known: h.0.attn.extra. Wrong"),
    (WEIGHTS | {"h.3.ln_1.bias": HEAD[0]}, "Not known: h.3.ln_1.bias. Wrong"),
    (WEIGHTS | {FC: WEIGHTS[FC].T}, "h.0.mlp.c_fc.kernel (32, 40) instead of (40, 32)"),
]


@pytest.mark.parametrize(("weights", "message"), MISFITS)
def test_weights_that_do_not_fit_are_refused(weights, message, tmp_path):
    folder = oracle.write_folder(tmp_path, weights)
    with pytest.raises(ValueError, match=f"do not fit its .*{re.escape(message)}"):
        FlaxLM.load(str(folder))


def test_a_truncated_file_is_refused_by_name(tmp_path):
    file = oracle.write_folder(tmp_path, WEIGHTS) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        FlaxLM.load(str(tmp_path))


@pytest.mark.parametrize("absent", [1, 2])
def test_an_absent_shard_is_named(absent, tmp_path):
    folder = oracle.write_folder(tmp_path, WEIGHTS, shards=2)
    file = folder / f"model-0000{absent}-of-00002.safetensors"
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=file.name):
        FlaxLM.load(str(folder))


def test_pickled_weights_are_not_opened(tmp_path):
    oracle.write_folder(tmp_path, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"\.bin, \.pt\) are not opened"):
        FlaxLM.load(str(tmp_path))


def test_a_folder_without_config_and_a_path_to_nowhere_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder without config\.json"):
        FlaxLM.load(str(tmp_path))
    for name in (str(tmp_path / "none"), "./none", "~/none", "a/b/none"):
        with pytest.raises(FileNotFoundError, match="is not a folder on this machine"):
            FlaxLM.load(name)


def test_the_hub_offline_fails_at_once_and_names_the_local_way(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    huggingface_hub.utils.reset_sessions()  # one made before would not be offline
    message = "'no/such' is no folder .* local folder .*, or lm='embedded', which"
    with pytest.raises(FileNotFoundError, match=message):
        FlaxLM.load("no/such")
    huggingface_hub.utils.reset_sessions()


@pytest.mark.parametrize("reason", ["", "no route to host"])
def test_a_hub_that_cannot_be_reached_names_the_local_way(reason, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(reason)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=f"hub: {reason}.*Give a local folder"):
        model_folder("gpt2")


def test_no_pickles_are_fetched_from_the_hub(monkeypatch, tmp_path):
    asked = []

    def fetch(name, *, allow_patterns, **options):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model_folder("some/model") == tmp_path
    good = ["config.json", "model.safetensors", "flax_model.msgpack"]
    there = [*good, "pytorch_model.bin", "tf_model.h5", "rust_model.ot", "onnx/a.onnx"]
    fetched = [
        [f for f in there for p in few if fnmatch.fnmatch(f, p)] for few in asked
    ]
    assert fetched == [good[:2], good[::2]]


def config_of(folder, kind, **fields):
    (folder / "config.json").write_text(json.dumps(RAW[kind] | fields))
    return load_config(folder)


ROPE = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
IGNORED = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    ("gpt2", {"surprise": 1, "quantization_config": {"bits": 8}}),
    ("llama", ROPE),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": True, "pretraining_tp": 2}),
    ("llama", {"head_dim": 8}),
    ("gemma", {"rope_theta": 500000.0}),
    ("gemma", {"hidden_act": "relu"}),
]


@pytest.mark.parametrize(("kind", "fields"), IGNORED)
def test_fields_that_flax_ignores_are_refused_all_at_once(kind, fields, tmp_path):
    with pytest.raises(ValueError, match="would silently ignore from") as caught:
        config_of(tmp_path, kind, **fields)
    for field, value in fields.items():
        assert f"{field}={value!r} (it " in str(caught.value)


def test_an_unknown_model_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'bert' .*gpt2, gpt_neo.*the torch source"):
        config_of(tmp_path, "gpt2", model_type="bert")


PUBLISHED = {
    "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "n_ctx": 12,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip


def test_published_configurations_and_neutral_fields_are_accepted(tmp_path):
    config = config_of(tmp_path, "gpt2", **PUBLISHED)
    assert (config.n_inner, config.layer_norm_epsilon) == (40, 0.01)
    assert config_of(tmp_path, "llama", head_dim=None).hidden_size == 32
    for kind in RAW:  # With all fields, as transformers writes them.
        config_of(tmp_path, kind).save_pretrained(tmp_path)
        assert load_config(tmp_path).model_type == kind


def test_old_bookkeeping_fields_are_accepted(tmp_path):
    config_of(tmp_path, "gpt2", n_special=0, predict_special_tokens=True)
    config_of(tmp_path, "gpt2", id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})


@pytest.mark.parametrize("kind", ["gpt_neo", "llama", "gemma"])
def test_a_family_loads_and_its_sites_hang_together_also_when_written(kind, tmp_path):
    random = FlaxLM.random(config_of(tmp_path, kind))
    buffers = {"transformer.h.0.attn.attention.bias": HEAD, "rope.inv_freq": HEAD}
    names = dict(oracle.pytorch_names(random.params)) | buffers
    lm = FlaxLM.load(str(oracle.write_folder(tmp_path, names, base=RAW[kind])))
    oracle.assert_same_params(lm.params, random.params)
    block, heads, local = lm.family.block, lm.family.heads, kind == "gpt_neo"
    norm = "ln_2" if local else "post_attention_layernorm"
    raw = [f"{block}.{n}.{norm}:in" for n in (0, 1)]
    ones = dict.fromkeys(lm.sites, 1.0)
    some = {site: 0.5 + i / 7 for i, site in enumerate(lm.sites)}
    none = {**ones, "head_out.1": 0.0, "mlp_hidden.0": 0.0, "resid_pre.0": 2.0}

    def run(by, tokens=TOKENS):
        write = {site: scale(factor) for site, factor in by.items()}
        return lm.run(tokens, read=(*lm.sites, *raw), write=write).values

    plain = run(ones)
    assert plain["head_out.0"].shape[-1] == (48 if kind == "gemma" else 32)
    for by in (ones, some, none):
        v = run(by)
        expected = {"resid_pre.0": plain["resid_pre.0"]}
        for n in (0, 1):
            mlp = f"{block}.{n}.{lm.family.hidden}"
            attn = oracle.projected(lm, f"{block}.{n}.{heads}", v[f"head_out.{n}"])
            expected |= {
                f"attn_out.{n}": attn,
                f"resid_mid.{n}": v[f"resid_pre.{n}"] + v[f"attn_out.{n}"],
                f"mlp_out.{n}": oracle.projected(lm, mlp, v[f"mlp_hidden.{n}"]),
                f"resid_post.{n}": v[f"resid_mid.{n}"] + v[f"mlp_out.{n}"],
            }
            np.testing.assert_allclose(v[raw[n]], v[f"resid_mid.{n}"], **NEAR)
        expected["resid_pre.1"] = v["resid_post.0"]
        for site, value in expected.items():
            np.testing.assert_allclose(v[site], by[site] * value, err_msg=site, **NEAR)
    assert not v["head_out.1"].any()
    assert not v["mlp_hidden.0"].any()
    changed = run(ones, TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % VOCAB))
    differ = {site: (changed[site] != plain[site]).any((0, 2)) for site in lm.sites}
    for site in lm.sites:
        assert not differ[site][:3].any(), site
        assert differ[site][3], site
    # Local attention reaches two tokens back, global attention all the way.
    assert (differ["resid_post.0"][6:] != local).all()
    assert differ["resid_post.1"][6:].all()
