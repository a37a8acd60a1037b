"""Where a language model's files are: embedded, in a folder, or on the hub."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

EMBEDDED = "embedded"
# Only what is read: no pickles, and none of the other frameworks' weights.
PATTERNS = """config.json tokenizer* vocab.json merges.txt special_tokens_map.json
added_tokens.json chat_template*""".split()
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]


def model_folder(name: str, *, weights: bool = True) -> Path:
    """The folder of `name`: 'embedded', a local folder, or a Hugging Face id.

    With `weights=False` nothing but configuration and tokenizer is fetched.
    """
    if name == EMBEDDED:
        return Path(__file__).parents[1] / "assets" / "small_gpt2"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise FileNotFoundError(
                f"lm={name!r} is a folder without config.json; it needs the Hugging "
                f"Face layout (config.json, model.safetensors, tokenizer files)"
            )
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"lm={name!r} is not a folder on this machine")
    return from_hub(name, weights)


def from_hub(name: str, weights: bool) -> Path:
    """Fetches the needed files, or says at once why it cannot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))

    try:
        folder = fetch(PATTERNS + WEIGHTS * weights)
        if weights and not any(folder.glob("model*.safetensors")):
            folder = fetch([*PATTERNS, "flax_model.msgpack"])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise FileNotFoundError(
            f"lm={name!r} is no folder here and could not be fetched from the Hugging "
            f"Face hub: {reason} Give a local folder in the Hugging Face layout, or "
            f"lm={EMBEDDED!r}, which needs no download"
        ) from None
    return folder


def fingerprint(weights: Any) -> str:
    """A checksum of a tree of arrays, names and values."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(weights):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data)
    return digest.hexdigest()[:16]
