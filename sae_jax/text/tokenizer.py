"""The tokenizer that belongs to a language model."""

from typing import Any

from sae_jax.lm.files import model_folder
from sae_jax.text.dialogues import chat_template as template_of


def load_tokenizer(lm: str = "embedded", *, chat_template: str = "") -> Any:
    """The fast tokenizer in the model's folder, or of a Hugging Face id.

    `chat_template` replaces its own: see `sae_jax.text.dialogues.chat_template`.
    """
    from transformers import AutoTokenizer

    folder = model_folder(lm, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"lm={lm!r} has no tokenizer that can be read from {folder} "
            f"(tokenizer.json, or vocab.json and merges.txt): {reason}"
        ) from None
    if chat_template:
        tokenizer.chat_template = template_of(chat_template)
    return tokenizer
