"""What a dry run says of the size of a training run; not an experiment."""

from collections import Counter
from typing import Any

import jax

from experiments._streams import widths
from sae_jax.model import SAE


def estimates(config: Any) -> dict[str, str]:
    """Numbers of parameters and tokens, memory, disk, for settings of training."""
    lm = config.outline() or config.open_lm()
    read = widths(config, lm)
    members = config.members(read)
    counts = [n_parameters(member.sae) for member in members.values()]
    total, data, every = sum(counts), config.data, config.every
    batch, rows = data.batch, config.train.steps * data.batch
    widest = max(member.sae.n_features for member in members.values())
    buffers = 0 if data.shards else 3 * data.buffer * sum(read.values())
    model = sum(x.size for x in jax.tree.leaves(getattr(lm, "params", {})))
    passed = data.contexts_per_pass * config.context
    wide = max(widest, lm.config.vocab_size)
    memory = 4 * (3 * total + max(counts) + 3 * batch * widest)
    graded = {}
    if config.graded_sites() and not data.shards:
        size, vocabulary = 12 * passed * lm.config.vocab_size, lm.config.vocab_size
        graded["memory for the model's gradients"] = (
            f"about {size / 1e9:.2g} GB (three arrays [{passed}, {vocabulary}]: "
            f"logits), and what its layers keep"
        )
    return {
        "SAEs": ", ".join(
            f"{n} of {size:,} parameters" for size, n in Counter(counts).items()
        ),
        "tokens": f"{rows:,} ({config.train.steps:,} steps of {batch:,})",
        "memory for the SAEs": f"about {memory / 1e9:.2g} GB (parameters, Adam, "
        f"one gradient, three arrays [{batch}, {widest}])",
        "memory for activations": f"{4 * buffers / 1e9:.2g} GB",
        "memory for the language model": f"{4 * model / 1e9:.2g} GB",
        **graded,
        "memory for evaluation": f"about {16 * passed * wide / 1e9:.2g} GB (four "
        f"arrays [{passed}, {wide}]: codes, or logits)",
        "disk": f"{4 * total * (3 * every.keep + 1) / 1e9:.2g} GB "
        f"({every.keep} checkpoints and the SAEs)",
    }


def n_parameters(sae: SAE) -> int:
    """How many numbers are learned."""
    return sum(array.size for array in sae.shapes().params.values())
