"""GPT-2 in NumPy float64, one token's attention at a time, written from its equations.

Weights carry PyTorch's names; a projection's weight is [in, out]. `edits` maps a site
to a plain function of the value that stood there. Below: weights to try it on, the
edits of `sae_jax.lm.edits` beside plain functions, and comparisons.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.flax import save_file

from sae_jax.lm.edits import Edit, ablate, add, apply, replace, scale
from sae_jax.lm.sites import Run

# Small, but every size differs from every other, so that no two can be exchanged; and
# an epsilon that is seen if it is not read.
LAYERS, WIDTH, HEADS, HIDDEN, VOCAB, CONTEXT = 3, 32, 4, 40, 64, 12
CONFIG = {
    "model_type": "gpt2",
    "n_layer": LAYERS,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_inner": HIDDEN,
    "vocab_size": VOCAB,
    "n_positions": CONTEXT,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 0.01,
}
PLACES = "resid_pre attn_out head_out resid_mid mlp_hidden mlp_out resid_post".split()
WIDTHS = {place: HIDDEN if place == "mlp_hidden" else WIDTH for place in PLACES}
SITES = [f"{place}.{layer}" for layer in range(LAYERS) for place in PLACES]


NEAR = {"rtol": 1e-5, "atol": 2e-5}  # float32 against float64; values are near 1
# Stored beside the weights in older files; no parameters.
BUFFERS = {f"h.{n}.attn.bias": np.ones((1, 1, 12, 12)) for n in range(LAYERS)} | {
    f"h.{n}.attn.masked_bias": np.float32(-1e4) for n in range(LAYERS)
}
# Tiny models of every family.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
LOCAL = {
    "num_layers": 2,
    "window_size": 3,
    "attention_types": [[["local", "global"], 1]],
}
RAW = {
    "gpt2": CONFIG,
    "gpt_neo": {"model_type": "gpt_neo", **SIZES, **LOCAL, "num_heads": 4},
    "llama": {"model_type": "llama", **SIZES, **GROUPED},
    "gemma": {"model_type": "gemma", **SIZES, **GROUPED, "head_dim": 24},
}


class Pass(NamedTuple):
    """What one pass gives, as `sae_jax.lm.sites.Run` has it."""

    values: dict[str, np.ndarray]
    logits: np.ndarray
    losses: np.ndarray


def forward(
    weights: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    edits: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
) -> Pass:
    """All sites, the logits, and the loss in nats of each token but the first."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    edits, tokens = edits or {}, np.asarray(tokens)
    values: dict[str, np.ndarray] = {}

    def at(site: str, value: np.ndarray) -> np.ndarray:
        values[site] = edits[site](value) if site in edits else value
        return values[site]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        unit = centred / np.sqrt(variance + CONFIG["layer_norm_epsilon"])
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    def project(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    stream = w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]
    for layer in range(LAYERS):
        h = f"h.{layer}"
        stream = at(f"resid_pre.{layer}", stream)
        qkv = project(norm(stream, f"{h}.ln_1"), f"{h}.attn.c_attn")
        heads = at(f"head_out.{layer}", attend(*np.split(qkv, 3, axis=-1)))
        attn = at(f"attn_out.{layer}", project(heads, f"{h}.attn.c_proj"))
        stream = at(f"resid_mid.{layer}", stream + attn)
        hidden = gelu_new(project(norm(stream, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
        hidden = at(f"mlp_hidden.{layer}", hidden)
        mlp = at(f"mlp_out.{layer}", project(hidden, f"{h}.mlp.c_proj"))
        stream = at(f"resid_post.{layer}", stream + mlp)
    head = w.get("lm_head.weight", w["wte.weight"])
    logits = norm(stream, "ln_f") @ head.T
    return Pass(values, logits, next_token_losses(logits, tokens))


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The heads' outputs side by side, each position looking back and at itself."""
    result = np.zeros_like(query)
    rows, length, width = query.shape
    d_head = width // HEADS
    for row in range(rows):
        for head in range(HEADS):
            part = slice(head * d_head, (head + 1) * d_head)
            for now in range(length):
                past = slice(0, now + 1)
                scores = key[row, past, part] @ query[row, now, part] / np.sqrt(d_head)
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                result[row, now, part] = shares @ value[row, past, part]
    return result


def gelu_new(x: np.ndarray) -> np.ndarray:
    """The tanh approximation, as GPT-2 was trained with."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def next_token_losses(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """`losses[b, t]` is the cross-entropy of predicting `tokens[b, t + 1]`."""
    rows, length = tokens.shape
    losses = np.zeros((rows, length - 1))
    for b in range(rows):
        for t in range(length - 1):
            z = logits[b, t]
            total = z.max() + np.log(np.exp(z - z.max()).sum())
            losses[b, t] = total - z[tokens[b, t + 1]]
    return losses


def random_weights(seed: int = 0, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Float32 weights under which every bias, scale and position matters."""
    rng = np.random.default_rng(seed)
    shapes = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (CONTEXT, WIDTH)}
    for layer in range(layers):
        for name, (n_in, n_out) in {
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (WIDTH, HIDDEN),
            "mlp.c_proj": (HIDDEN, WIDTH),
        }.items():
            shapes[f"h.{layer}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{layer}.{name}.bias"] = (n_out,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{name}.weight"] = (WIDTH,)
            shapes[f"h.{layer}.{name}.bias"] = (WIDTH,)
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    weights = {}
    for name, shape in shapes.items():
        spread = 1.5 / np.sqrt(shape[0]) if len(shape) == 2 else 0.3
        if name in ("wte.weight", "wpe.weight"):
            spread = 0.5
        weights[name] = rng.normal(size=shape) * spread
        if ".ln_" in f".{name}" and name.endswith("weight"):
            weights[name] += 1
    return {name: value.astype(np.float32) for name, value in weights.items()}


def prefixed(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The names in files of the whole model, head included."""
    return {f"transformer.{name}": value for name, value in weights.items()}


def pytorch_names(params: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a Flax model as PyTorch's `Linear` and norms would hold them."""
    for path, value in flatten_dict(params).items():
        kind = path[-1] if path[-1] == "bias" else "weight"
        yield ".".join((*path[:-1], kind)), value.T if path[-1] == "kernel" else value


def projected(lm: Any, path: str, x: Any) -> np.ndarray:
    """What the projection at `path` makes of `x`."""
    for name in path.split("."):
        lm = getattr(lm, "params", lm)[name]
    return np.asarray(x @ lm["kernel"] + lm.get("bias", 0))


def write_folder(
    folder: Path,
    weights: Mapping[str, Any],
    *,
    shards: int = 1,
    base: Mapping[str, Any] = CONFIG,
    **config: Any,
) -> Path:
    """The Hugging Face layout: `config.json` and safetensors, sharded or one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    files = {"model.safetensors": sorted(weights)}
    if shards > 1:
        files = {
            f"model-{i + 1:05}-of-{shards:05}.safetensors": sorted(weights)[i::shards]
            for i in range(shards)
        }
        index = {"weight_map": {name: file for file in files for name in files[file]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, names in files.items():
        save_file({name: jnp.asarray(weights[name]) for name in names}, folder / file)
    return folder


def squashed(old: Any, by: float, shift: Any) -> Any:
    """Something for `apply`."""
    return old * by / (1 + old**2) + shift


def edit_pair(
    kind: str,
    place: str,
    tokens: np.ndarray,
    where: np.ndarray | None = None,
    seed: int = 2,
) -> tuple[Edit, Callable[[np.ndarray], np.ndarray]]:
    """One edit, and the plain function that does the same."""
    rng = np.random.default_rng(seed)
    vector = rng.normal(size=WIDTHS[place]).astype(np.float32)
    whole = rng.normal(size=(*tokens.shape, WIDTHS[place])).astype(np.float32)
    at = None if where is None else jnp.asarray(where)
    edit, new = {
        "replace": lambda: (replace(jnp.asarray(whole), where=at), lambda old: whole),
        "add": lambda: (add(jnp.asarray(vector), where=at), lambda old: old + vector),
        "scale": lambda: (scale(-1.5, where=at), lambda old: -1.5 * old),
        "ablate": lambda: (ablate(where=at), np.zeros_like),
        "apply": lambda: (
            apply(squashed, 2.0, jnp.asarray(vector), where=at),
            lambda old: squashed(old, 2.0, vector),
        ),
    }[kind]()
    if where is None:
        return edit, new
    return edit, lambda old: np.where(where[..., None], new(old), old)


def assert_same_pass(found: Run, expected: Pass) -> None:
    """All sites, logits and losses are those of the oracle."""
    for site in SITES:
        np.testing.assert_allclose(
            found.values[site], expected.values[site], err_msg=site, **NEAR
        )
    np.testing.assert_allclose(found.logits, expected.logits, **NEAR)
    np.testing.assert_allclose(found.losses, expected.losses, **NEAR)


def assert_same_params(found: Any, expected: Any) -> None:
    """The same leaves, bit for bit, and all in float32."""
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert found[path].dtype == jnp.float32, path
        np.testing.assert_array_equal(found[path], value, err_msg=str(path))


def directional(weights, tokens, site, direction, edits, per_loss) -> float:
    """The derivative of the summed losses along a direction at a site, numerically."""
    step = 1e-5

    def total(amount):
        def shifted(old):
            return edits.get(site, lambda x: x)(old) + amount * direction

        losses = forward(weights, tokens, {**edits, site: shifted}).losses
        return (losses * np.asarray(per_loss)).sum()

    return (total(step) - total(-step)) / (2 * step)


def assert_gradients(grads, weights, tokens, edits=(), per_loss=1.0) -> None:
    """In two random directions, so that no entry can be off unseen."""
    rng = np.random.default_rng(4)
    for site, gradient in grads.items():
        gradient = np.asarray(gradient, np.float64)
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            expected = directional(
                weights, tokens, site, direction, dict(edits), per_loss
            )
            found = (gradient * direction).sum()
            atol = 2e-5 * np.linalg.norm(gradient)
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=site)
