"""Gemma Scope's files: `params.npz` (Gemma 2) and `params.safetensors` (Gemma 3).

JumpReLU autoencoders and transcoders that subtract nothing from their input. There is
no description in the first, so layer and hook come from the path, where it is the one
of Gemma Scope. SAEs of embeddings were trained on rows divided by sqrt(width); their
matrices are changed so that they take the rows as the model has them.
"""

import re
from pathlib import Path

import numpy as np

from sae_jax import formats
from sae_jax.exchange.layout import Foreign, assembled, description, take
from sae_jax.exchange.provenance import about_of
from sae_jax.exchange.tensors import of_npz, of_safetensors
from sae_jax.formats import Place
from sae_jax.trained import TrainedSAE

NAME, ARCHIVE, SAFE, CONFIG = (
    "gemma_scope",
    "params.npz",
    "params.safetensors",
    "config.json",
)
KEYS = {n: n for n in ("b_enc", "b_dec", "threshold")}
SITES = {
    "resid_post": "resid_post",
    "res": "resid_post",
    "attn_out": "head_out",  # before the output projection
    "att": "head_out",
    "mlp_out": "mlp_out",
    "mlp": "mlp_out",
}


def recognises(place: Place) -> bool:
    """One of the two names, or an archive that was given by itself."""
    alone = len(place.given) == 1 and next(iter(place.given)).endswith(".npz")
    return alone or bool({ARCHIVE, SAFE} & place.given)


def read(place: Place) -> TrainedSAE:
    """A JumpReLU SAE or transcoder of Gemma Scope."""
    safe = SAFE in place.given
    names = sorted(n for n in place.given if n.endswith(".npz"))
    path = place.folder / (SAFE if safe else names[0])
    held = of_safetensors(path) if safe else of_npz(path)
    if "affine_skip_connection" in held:
        raise ValueError(
            f"{path} has a linear path past the features (affine_skip_connection), "
            f"which no SAE here has."
        )
    letter = "w" if "w_enc" in held else "W"
    keys = KEYS | {"W_enc": f"{letter}_enc.T", "W_dec": f"{letter}_dec"}
    transcoder = any("transcoder" in part for part in place.folder.parts[-5:])
    arrays = take(path, held, keys, transcoder=transcoder)
    embedding = "embedding" in place.folder.parts[-3:]
    if embedding:
        root = np.float32(np.sqrt(arrays["W_enc"].shape[1]))
        arrays |= {"W_enc": arrays["W_enc"] / root, "W_dec": arrays["W_dec"] * root}
    beside = place.folder / CONFIG
    config = description(beside) if beside.is_file() else {}
    about = about_of(
        NAME,
        config,
        lm=config.get("model_name"),
        site=None if embedding or transcoder else site_of(place.folder),
        folder="/".join(place.folder.parts[-3:]),
    )
    kind = Foreign("above", arrays, {}, False, about, transcoder=transcoder)
    return assembled(path, kind)


def site_of(folder: Path) -> str | None:
    """The site that a path of Gemma Scope's names."""
    layer = re.search(r"layer_(\d+)", str(folder))
    words = re.findall(r"[a-z_]+", str(folder).replace("-", "/").replace("_all", ""))
    place = next((SITES[word] for word in reversed(words) if word in SITES), None)
    return f"{place}.{layer[1]}" if place and layer else None


formats.register(
    formats.Format(
        name=NAME,
        holds=f"{ARCHIVE} or {SAFE}",
        recognises=recognises,
        read=read,
    )
)
