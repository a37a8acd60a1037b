"""SAEs of other libraries: read, written, fetched from the hub and sent there.

One file a format, each with a record in `formats.FORMATS`; importing this package
registers them. Whatever is read becomes a `TrainedSAE` like any other.
"""

from pathlib import Path

from sae_jax.exchange import (  # noqa: F401 (each registers its format)
    dictionary_learning,
    gemma_scope,
    openai,
    saelens,
    sparsify,
)
from sae_jax.exchange.hub import place, push_to_hub
from sae_jax.formats import FORMATS
from sae_jax.trained import TrainedSAE

__all__ = ["load", "push_to_hub"]


def load(path: str | Path) -> TrainedSAE:
    """The SAE in a folder or file, or of a name on the Hugging Face hub.

    Read are our own format and those of SAELens, sparsify, dictionary_learning, Gemma
    Scope and OpenAI; the names of the files tell them apart. On the hub:
    `owner/repository/folder`, or a well-known release and its SAE, such as
    `gpt2-small-res-jb/blocks.8.hook_resid_pre`. `sae.about` says what is known of it.
    """
    where = place(path)
    found = [name for name in FORMATS if FORMATS[name].recognises(where)]
    if len(found) == 1:
        sae: TrainedSAE = FORMATS[found[0]].read(where)
        return sae
    if found:
        raise ValueError(
            f"{path} may be an SAE of {' or '.join(found)}; give the file itself."
        )
    there = ", ".join(sorted(where.given)[:8]) or "no files"
    known = "\n".join(f"  {name}: {FORMATS[name].holds}" for name in FORMATS)
    raise ValueError(
        f"{path} holds {there}, which is no SAE in a known format:\n{known}"
    )
