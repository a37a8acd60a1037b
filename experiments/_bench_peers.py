"""The peers of `bench`: training steps in PyTorch, by what each library offers itself.

    python -m experiments._bench_peers sparsify|saelens|dense_top_afa TASK

sparsify: `SparseCoder` with the calls of its `Trainer`, in that order, for loss_fn
"fvu" and auxk_alpha 0, its default. On a GPU its forward pass is always bfloat16.
SAELens: `SAETrainer.step`, with its defaults: it clips gradients to norm 1, rescales
codes by decoder norms instead of keeping rows at norm 1, counts firings, and gives dead
features an auxiliary loss. Its squared error is a sum over width and ours a mean, so
coefficients are multiplied by the width.
dense_top_afa: `_bench_dense_top_afa`.
All three: `torch.optim.Adam` with a learning rate of 3e-4.
"""

import importlib
import importlib.metadata
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments._bench_workers import System, Task, peak_resident, serve, task_given

LR = 3e-4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# For each of our rules: SAELens's architecture, and what its configuration is told.
Told = Callable[[dict[str, Any], int, int], dict[str, Any]]
SAELENS: dict[str, tuple[str, Told]] = {
    "topk": ("topk", lambda v, D, F: {"k": v["k"]}),
    "batch_topk": ("batchtopk", lambda v, D, F: {"k": v["k"]}),
    "matryoshka": (
        "matryoshka_batchtopk",
        lambda v, D, F: {
            "k": v["k"],
            "matryoshka_widths": [round(share * F) for share in v["prefixes"]],
        },
    ),
    "relu": ("standard", lambda v, D, F: {"l1_coefficient": v["coef"] * D}),
    "gated": ("gated", lambda v, D, F: {"l1_coefficient": v["coef"] * D}),
    "jump_relu": (
        "jumprelu",
        lambda v, D, F: {
            "l0_coefficient": v["coef"] * D,
            "jumprelu_bandwidth": v["bandwidth"],
            "jumprelu_init_threshold": v["first_threshold"],
        },
    ),
}


def sparsify(task: Task) -> System:
    """One step as in the loop of `sparsify.Trainer`."""
    from sparsify import SparseCoder, SparseCoderConfig

    batches, W_dec = data(task)
    config = SparseCoderConfig(num_latents=task.n_features, k=task.values["k"])
    coder = SparseCoder(W_dec.shape[1], config, DEVICE, torch.float32)
    coder.encoder.weight.data.copy_(W_dec)
    coder.W_dec.data.copy_(W_dec)
    optimiser = torch.optim.Adam(coder.parameters(), lr=LR)
    fired = torch.zeros(task.n_features, dtype=torch.bool, device=DEVICE)
    idle = torch.zeros(task.n_features, dtype=torch.long, device=DEVICE)

    def once() -> torch.Tensor:
        x = next(batches)
        coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        with cast(task):
            out = coder(x, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        idle.add_(len(x))
        idle[fired] = 0
        fired.zero_()
        return out.fvu.detach() * variance / x.numel()

    return system(once, "eai-sparsify")


def saelens(task: Task) -> System:
    """One step of SAELens's own trainer."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    batches, W_dec = data(task)
    n_features, width = W_dec.shape
    architecture, told = SAELENS[task.rule]
    made, configured = get_sae_training_class(architecture)
    config: Any = configured(
        d_in=width,
        d_sae=n_features,
        device=DEVICE,
        decoder_init_norm=1.0,
        **told(dict(task.values), width, n_features),
    )
    sae: Any = made(config)
    sae.to(DEVICE)
    sae.W_dec.data.copy_(W_dec)
    sae.W_enc.data.copy_(W_dec.T)
    if task.compile_peers:  # as its runner does
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=task.batch,
            lr=LR,
            lr_end=LR,
            device=DEVICE,
            autocast=task.dtype == "bfloat16",
        ),
        sae,
        batches,
    )

    def once() -> torch.Tensor:
        out = trainer.step(next(batches))
        trainer.n_training_steps += 1
        levels = [loss for name, loss in out.losses.items() if "mse_loss" in name]
        return torch.stack(levels).detach().mean() / width

    return system(once, "sae-lens")


def dense_top_afa(task: Task) -> System:
    """One step of the dense baseline."""
    from experiments._bench_dense_top_afa import DenseTopAFA, constrain

    batches, W_dec = data(task)
    model = DenseTopAFA(W_dec).to(DEVICE)
    optimiser = torch.optim.Adam(model.parameters(), lr=LR)

    def once() -> torch.Tensor:
        with cast(task):
            out = model(next(batches), task.values["coef"])
        out.loss.backward()
        constrain(model)
        optimiser.step()
        optimiser.zero_grad()
        return out.mse.detach()

    return system(once, "torch")


def data(task: Task) -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    """Batches `[B, D]` without end, and decoder rows `[F, D]`."""
    folder = Path(task.folder)
    x, W_dec = (
        torch.from_numpy(np.load(folder / name)).to(DEVICE)
        for name in ("x.npy", "W_dec.npy")
    )
    return itertools.cycle(x), W_dec


def cast(task: Task) -> torch.autocast:
    """Products in bfloat16, if the task says so."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=task.dtype == "bfloat16")


def system(once: Callable[[], torch.Tensor], library: str) -> System:
    """The worker's answers about itself; a step ends when the GPU has done it."""
    versions = {n: importlib.metadata.version(n) for n in {library, "torch"}}
    if DEVICE == "cpu":
        return System(once, versions, "cpu")

    def waiting() -> torch.Tensor:
        mse = once()
        torch.cuda.synchronize()
        return mse

    return System(waiting, versions, torch.cuda.get_device_name())


def main(peer: str, task: Task) -> None:
    """Builds one peer, then serves."""
    library, build = {
        "sparsify": ("sparsify", sparsify),
        "saelens": ("sae_lens", saelens),
        "dense_top_afa": ("torch", dense_top_afa),
    }[peer]

    def start() -> Callable[[], int]:
        torch.set_num_threads(task.threads)
        # As JAX does by default: on a GPU, float32 products by TensorFloat-32.
        torch.backends.cuda.matmul.allow_tf32 = True
        importlib.import_module(library)
        torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2, device=DEVICE)
        return peak_resident if DEVICE == "cpu" else torch.cuda.max_memory_allocated

    serve(task, start, build)


if __name__ == "__main__":
    main(sys.argv[1], task_given())
