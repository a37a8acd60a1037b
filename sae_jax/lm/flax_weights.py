"""Configuration and weights of transformers' Flax models, from files.

Reads the Hugging Face layout: `config.json` with `model.safetensors` (PyTorch names,
one file or sharded; torch is not needed) or `flax_model.msgpack`. Pickled weights are
not opened.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax.core import unfreeze
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    FLAX_MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    FlaxPreTrainedModel,
    PretrainedConfig,
)

# Every model says that Flax ends with transformers 5; that is why 4 is pinned.
logging.getLogger("transformers.modeling_flax_utils").addFilter(
    lambda record: "classes are deprecated" not in record.getMessage()
)


class Reads(NamedTuple):
    """What a Flax model makes of its configuration (transformers 4.57).

    `fields` change the result and are read; `only` are fields that it does not read,
    with the one value for which that is no loss.
    """

    fields: frozenset[str]
    only: dict[str, Any]


COMMON = frozenset(
    "model_type vocab_size hidden_size num_attention_heads num_hidden_layers "
    "max_position_embeddings tie_word_embeddings".split()
)
LLAMA_LIKE = COMMON | frozenset(
    "hidden_act intermediate_size num_key_value_heads rms_norm_eps "
    "attention_bias".split()
)
READS = {
    "gpt2": Reads(
        COMMON
        | frozenset(
            "n_embd n_head n_layer n_positions n_ctx n_inner activation_function "
            "layer_norm_epsilon".split()
        ),
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            # Only changes the dtype in which PyTorch computes attention's softmax.
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
    ),
    "gpt_neo": Reads(
        COMMON
        | frozenset(
            "num_layers num_heads attention_types attention_layers window_size "
            "intermediate_size activation_function layer_norm_epsilon".split()
        ),
        {},
    ),
    "llama": Reads(
        LLAMA_LIKE - {"tie_word_embeddings"},
        {
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "tie_word_embeddings": False,
            "head_dim": "hidden_size / num_attention_heads",
        },
    ),
    "gemma": Reads(
        (LLAMA_LIKE - {"hidden_act"}) | {"head_dim", "hidden_activation"},
        {
            # PyTorch reads this one, Flax the other.
            "hidden_act": "gelu_pytorch_tanh",
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "use_bidirectional_attention": None,
        },
    ),
}
# Without effect on the values at evaluation: training, generation, bookkeeping.
HARMLESS = frozenset(
    "architectures attn_pdrop embd_pdrop resid_pdrop resid_dropout embed_dropout "
    "attention_dropout classifier_dropout initializer_range bos_token_id "
    "eos_token_id pad_token_id use_cache torch_dtype dtype transformers_version "
    "task_specific_params return_dict output_attentions output_hidden_states "
    "summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout _name_or_path tokenizer_class n_special id2label label2id "
    "predict_special_tokens output_past _num_labels gradient_checkpointing".split()
)
# Stored beside the weights by PyTorch: causal masks and rotary frequencies.
BUFFERS = (
    ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
    ".inv_freq",
)  # fmt: skip


def load_config(folder: Path) -> PretrainedConfig:
    """The configuration; refuses fields that the Flax model would silently ignore."""
    raw = json.loads((folder / "config.json").read_text())
    kind = raw.get("model_type")
    if kind not in READS:
        raise ValueError(
            f"model_type={kind!r} in {folder / 'config.json'} is none that the Flax "
            f"source is known to compute rightly ({', '.join(READS)}); "
            f"the torch source takes any causal LM"
        )
    config = AutoConfig.from_pretrained(folder)
    reads = READS[kind]
    faults = []
    for field, value in raw.items():
        if field in reads.only:
            needed = reads.only[field]
            if needed == "hidden_size / num_attention_heads":
                needed = config.hidden_size // config.num_attention_heads
                if value is None:
                    continue
            if value != needed:
                faults.append(f"{field}={value!r} (it computes {needed!r})")
        elif field not in reads.fields | HARMLESS:
            faults.append(f"{field}={value!r} (it does not know this field)")
    for field, value in reads.only.items():
        default = getattr(config, field, value)
        if field not in raw and not isinstance(value, str) and default != value:
            faults.append(f"{field}={default!r} by default (it computes {value!r})")
    if faults:
        raise ValueError(
            f"transformers' Flax model {kind!r} would silently ignore from "
            f"{folder / 'config.json'}: {'; '.join(faults)}. "
            f"Use the torch source for this model"
        )
    return config


def load_params(folder: Path, model: FlaxPreTrainedModel) -> dict:
    """All parameters in float32; refuses missing, foreign and misshapen ones.

    Half-precision files are upcast here: transformers would keep them as they come.
    """
    shapes = flatten_dict(unfreeze(model.params_shape_tree))
    if (folder / "model.safetensors.index.json").exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted({folder / name for name in index["weight_map"].values()})
    else:
        files = list(folder.glob("model.safetensors"))
    if files:
        params = from_pytorch(files, shapes, model.base_model_prefix)
    elif (folder / "flax_model.msgpack").exists():
        raw = (folder / "flax_model.msgpack").read_bytes()
        params = flatten_dict(msgpack_restore(raw))
    else:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors (or its index) nor "
            f"flax_model.msgpack; pickled weights (.bin, .pt) are not opened, since "
            f"they can execute code: save them again with safe_serialization=True"
        )
    missing = sorted(set(shapes) - set(params))
    foreign = sorted(set(params) - set(shapes))
    wrong = [
        f"{'.'.join(k)} {params[k].shape} instead of {shapes[k].shape}"
        for k in shapes
        if k in params and params[k].shape != shapes[k].shape
    ]
    if missing or foreign or wrong:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json. "
            f"Missing: {shown(missing)}. Not known: {shown(foreign)}. "
            f"Wrong shape: {', '.join(wrong[:3]) or 'none'}"
        )
    return unflatten_dict(
        {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}
    )


def from_pytorch(files: list[Path], shapes: dict, prefix: str) -> dict:
    """PyTorch tensors under Flax names, without torch."""
    params = {}
    for file in files:
        try:
            with safe_open(file, framework="flax") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name.endswith(BUFFERS):
                        continue
                    path = flax_path(name, shapes, prefix)
                    value = opened.get_tensor(name)
                    params[path] = value.T if path[-1] == "kernel" else value
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    # Models that tie it to the embedding may store it all the same.
    if ("lm_head", "kernel") not in shapes:
        params.pop(("lm_head", "weight"), None)
    return params


def flax_path(name: str, shapes: dict, prefix: str) -> tuple[str, ...]:
    """Where the Flax model keeps what PyTorch calls `name`; as it is if nowhere.

    The weight of a layer norm is its scale, that of a projection its kernel; a file
    of the bare model lacks the prefix.
    """
    *modules, leaf = name.split(".")
    leaves = [leaf, "scale", "embedding", "kernel"] if leaf == "weight" else [leaf]
    for start in ((), (prefix,)):
        for candidate in leaves:
            path = (*start, *modules, candidate)
            if path in shapes:
                return path
    return (*modules, leaf)


def build(config: PretrainedConfig, dtype: str, **options: Any) -> FlaxPreTrainedModel:
    """Transformers' Flax class for causal language models of this kind, built."""
    kind: Any = FLAX_MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind(config, dtype=jnp.dtype(dtype), **options)


def shown(paths: list[tuple[str, ...]]) -> str:
    """The first few names, and how many more there are."""
    names = [".".join(path) for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
