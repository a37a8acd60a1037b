"""SAELens in `bench_train`, in an environment of its own; not an experiment.

Its own classes throughout: TransformerLens's model, `ActivationsStore` with its mixing
buffer, `SAETrainer`. Of a buffer of two rounds' rows it keeps half and serves half, so
that a round reads as many tokens as it trains on, mixed with those of the round before.
"""

import json
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

import datasets
import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

from experiments._bench_lm_peers import hooked
from experiments._bench_workers import answer, peak_resident


def main(config: dict[str, Any]) -> None:
    """Builds all, runs a first round, then runs one for each line that comes."""
    warnings.simplefilter("ignore")  # of epochs, and of names that are to go
    torch.manual_seed(0)
    batches = open_store(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=config["batch"],
            lr=3e-4,
            lr_end=3e-4,
        ),
        TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=config["width"], d_sae=config["n_features"], k=config["k"]
            )
        ),
        batches,
    )

    def one_round() -> float:
        began = time.perf_counter()
        for _ in range(config["buffer"] // config["batch"]):
            trainer.step(next(batches))
            trainer.n_training_steps += 1
        return time.perf_counter() - began

    one_round()
    libraries = ("sae-lens", "torch", "transformer-lens", "transformers")
    answer(versions={name: version(name) for name in libraries})
    for _ in sys.stdin:
        answer(seconds=one_round(), peak_mb=peak_resident() / 1e6)


def open_store(config: dict[str, Any]) -> ActivationsStore:
    """Activations of random tokens, as `bench_train` draws them."""
    shape = (config["buffer"] // config["context"], config["context"])
    tokens = np.random.default_rng(0).integers(1, config["vocab_size"], shape)
    tokens[:, 0] = 0
    return ActivationsStore(
        model=hooked(config),
        dataset=datasets.Dataset.from_dict({"tokens": tokens}),
        streaming=False,
        hook_name=f"blocks.{config['layer']}.hook_resid_pre",
        hook_head_index=None,
        context_size=config["context"],
        d_in=config["width"],
        n_batches_in_buffer=2 * config["buffer"] // config["context"],
        total_training_tokens=config["buffer"],
        store_batch_size_prompts=config["contexts_per_pass"],
        train_batch_size_tokens=config["batch"],
        prepend_bos=False,  # it is there
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
