"""The folders of sparsify: `cfg.json` and `sae.safetensors`, of one hookpoint each.

Read and written are TopK autoencoders and transcoders without a skip connection, as
eai-sparsify 1.3.3 has them. It subtracts `b_dec` from the input of every autoencoder.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sae_jax import checks, formats
from sae_jax.exchange.layout import (
    Foreign,
    assembled,
    description,
    setting,
    table,
    take,
)
from sae_jax.exchange.outward import b_enc_if_centred, outward
from sae_jax.exchange.provenance import about_of, facts_of
from sae_jax.exchange.tensors import of_safetensors
from sae_jax.formats import Place
from sae_jax.trained import TrainedSAE

NAME, CONFIG, WEIGHTS = "sparsify", "cfg.json", "sae.safetensors"
KEYS = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}
# Its hookpoints are names of modules; those of a block and its parts are sites.
PARTS = {
    "": "resid_post",
    "mlp": "mlp_out",
    "attn": "attn_out",
    "attention": "attn_out",
}


def recognises(place: Place) -> bool:
    """Weights of our own name, with a description of its name."""
    named = WEIGHTS in place.given or CONFIG in place.given
    return named and place.has(WEIGHTS) and place.has(CONFIG)


def read(place: Place) -> TrainedSAE:
    """A sparse coder of sparsify."""
    path, weights = place.folder / CONFIG, place.folder / WEIGHTS
    known = table(NAME)["activations"]
    config = {"activation": next(iter(known)), "transcode": False, **description(path)}
    activation = config["activation"]
    if not isinstance(activation, str) or activation not in known:
        said = checks.unknown("activation", str(activation), known)
        raise ValueError(f"{path}: {said}")
    if config.get("skip_connection"):
        raise ValueError(
            f"{path}: skip_connection is {config['skip_connection']!r}; a linear path "
            f"past the features is what no SAE here has."
        )
    transcoder = setting(path, config, "transcode", bool)
    width = setting(path, config, "d_in", int)
    sizes = {"D_in": width, "D_out": width}
    n_features = config.get("num_latents") or width * setting(
        path, config, "expansion_factor", int
    )
    held = of_safetensors(weights)
    arrays = take(
        weights, held, KEYS, sizes=sizes | {"F": n_features}, transcoder=transcoder
    )
    hookpoint = config.get("hookpoint", place.folder.name)
    about = about_of(NAME, config, site=site_of(hookpoint))
    settings = {"k": setting(path, config, "k", int)}
    return assembled(
        path,
        Foreign(
            known[activation],
            arrays,
            settings,
            not transcoder,
            about,
            transcoder=transcoder,
        ),
    )


def site_of(hookpoint: str) -> str | None:
    """The site of a hookpoint such as `layers.5` or `h.3.mlp`."""
    found = re.fullmatch(
        r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.(\w+))?", str(hookpoint)
    )
    place = PARTS.get(found[2] or "") if found else None
    return f"{place}.{found[1]}" if found and place else None


def write(trained: TrainedSAE, folder: Path) -> None:
    """What `sparsify.SparseCoder.load_from_disk` reads."""
    outside = outward(trained, NAME)
    sae, said = outside.sae, outside.counterpart
    activations = {kind: n for n, kind in table(NAME)["activations"].items()}
    if said.kind not in activations:
        raise outside.refusal(NAME, "its sparse coders keep the k largest of each row.")
    if sae.treatment != "none":
        raise outside.refusal(NAME, f"it does nothing like {sae.treatment!r} to rows.")
    if sae.width_out != sae.d_in:
        raise outside.refusal(NAME, "its transcoders are as wide behind as before.")
    b_enc = outside.weights["b_enc"] if sae.is_transcoder else b_enc_if_centred(outside)
    weights = outside.weights | {"b_enc": b_enc}
    save_file(
        {theirs: np.ascontiguousarray(weights[ours]) for ours, theirs in KEYS.items()},
        folder / WEIGHTS,
    )
    norms = np.linalg.norm(weights["W_dec"], axis=1)
    config = {
        "activation": activations[said.kind],
        "expansion_factor": max(1, sae.n_features // sae.d_in),
        "normalize_decoder": bool(np.allclose(norms, 1, atol=1e-4)),
        "num_latents": sae.n_features,
        "k": said.settings["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
        **facts_of(trained),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


formats.register(
    formats.Format(
        name=NAME,
        holds=f"a folder of {CONFIG} and {WEIGHTS}",
        recognises=recognises,
        read=read,
        write=write,
        files=frozenset({CONFIG, WEIGHTS}),
    )
)
