"""The tokenizer that belongs to a language model."""

from typing import Any

from sae_jax.lm.files import model_folder


def load_tokenizer(lm: str = "embedded") -> Any:
    """The fast tokenizer in the model's folder, or of a Hugging Face id."""
    from transformers import AutoTokenizer

    folder = model_folder(lm, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"lm={lm!r} has no tokenizer that can be read from {folder} "
            f"(tokenizer.json, or vocab.json and merges.txt): {reason}"
        ) from None
