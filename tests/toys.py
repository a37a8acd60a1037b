"""Toys that need no files: a tokenizer, documents, a random language model."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GPT2Config

from sae_jax.activations import Harvester, OnTheFly, harvest
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.text.contexts import Packing, contexts
from sae_jax.text.documents import Documents, Files

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


SITES = ("resid_post.0", "mlp_hidden.1")
DOCUMENTS, TOKENS, PACKING = toy_documents(40), Characters(), Packing(8)
BATCH, BUFFER = 6, 24


@functools.cache
def toy_lm(seed: int = 0) -> FlaxLM:
    """Two blocks of width 16."""
    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    return FlaxLM.random(config, seed=seed)


@functools.cache
def toy_harvester() -> Harvester:
    """Reads two sites of it."""
    return Harvester(toy_lm(), SITES, contexts_per_pass=4)


def one_by_one(n: int) -> dict[str, np.ndarray]:
    """The first n used rows, each context given to the model alone."""
    rows: dict[str, list] = {site: [] for site in SITES}
    for context in contexts(DOCUMENTS, TOKENS, PACKING):
        values = toy_lm().run(context.tokens[None], read=SITES).values
        for site in SITES:
            rows[site].extend(np.asarray(values[site][0])[context.use])
        if len(rows[SITES[0]]) >= n:
            break
    return {site: np.stack(rows[site])[:n] for site in SITES}


def on_the_fly(documents: Documents = DOCUMENTS, **changes: Any) -> OnTheFly:
    """A stream of small batches."""
    options = {"batch": BATCH, "buffer": BUFFER, "seed": 0, "packing": PACKING}
    options |= changes
    harvester, packing = (
        options.pop("harvester", toy_harvester()),
        options.pop("packing"),
    )
    return OnTheFly(harvester, documents, TOKENS, packing, **options)  # type: ignore


def run_harvest(
    folder: Path,
    rows: int = 50,
    *,
    harvester: Harvester | None = None,
    documents: Documents = DOCUMENTS,
    **changes: Any,
) -> dict[str, Any]:
    """A harvest into small shards."""
    options: dict[str, Any] = {"rows_per_shard": 20, "text": {"dataset": "toy"}}
    return harvest(
        folder,
        harvester or toy_harvester(),
        documents,
        TOKENS,
        PACKING._replace(repeat=False),
        rows=rows,
        **options | changes,
    )


def equal(a: dict, b: dict) -> bool:
    """Whether two batches are the same to the last bit."""
    return all((np.asarray(a[site]) == np.asarray(b[site])).all() for site in SITES)
