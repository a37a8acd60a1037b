"""A tokenizer and documents that need no files: one token per character."""

from sae_jax.text.documents import Files

BOS = 0


class Characters:
    """Characters as tokens 1 to 50; 0 is BOS, which no text holds."""

    bos_token_id = BOS
    eos_token_id = BOS

    def __call__(self, text, **_):
        return {"input_ids": [1 + ord(c) % 50 for c in text]}


def toy_documents(n: int = 10, seed: int = 3) -> Files:
    """Documents of 0 to 12 characters (one is empty), of one letter each."""
    return Files([chr(97 + i) * (i * 7 % 13) for i in range(n)], lambda n: n, seed)


def in_order(documents: Files, epoch: int = 0) -> list[str]:
    """The texts of one epoch."""
    return [text for _, text in documents.read([epoch, 0])]
