"""The other libraries of `exchange`, each in its own environment.

    PYTHON -m experiments._exchange_peers PEER make FOLDER
    PYTHON -m experiments._exchange_peers PEER read FOLDER

`make` writes a random SAE of each class of the library, as the library writes it, into
FOLDER/CASE/..., with the rows, codes and reconstructions of its own code in
FOLDER/CASE/expected.npz. `read` loads, by the library's own loader, whatever lies in
FOLDER/CASE/sae, encodes FOLDER/CASE/x.npy, and writes FOLDER/CASE/found.npz. Both print
the library's version.
"""

import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments._exchange_layouts import (
    D,
    F,
    K,
    gemma_scope_make,
    openai_make,
    rows,
    saelens_codes,
    write,
)

Case = tuple[str, Callable[[Path], None], Callable[[Any], tuple[Any, Any]]]


def shaken(module: torch.nn.Module, seed: int) -> None:
    """Every parameter away from where it started; thresholds above 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "threshold":
                parameter.copy_(0.2 + 0.5 * torch.rand_like(parameter))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))


# SAELens ------------------------------------------------------------------------------


def saelens_cases() -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Name, architecture, settings, and whether it is saved as it trains."""
    for plain in ("standard", "jumprelu", "gated"):
        yield plain, plain, {}, False
    yield "topk", "topk", {"k": K, "rescale_acts_by_decoder_norm": False}, False
    yield "topk_rescaled", "topk", {"k": K, "rescale_acts_by_decoder_norm": True}, False
    yield (
        "topk_layer_norm",
        "topk",
        {"k": K, "normalize_activations": "layer_norm"},
        False,
    )
    not_centred = {"apply_b_dec_to_input": False}
    yield "standard_not_centred", "standard", not_centred, False
    yield "standard_bfloat16", "standard", {"dtype": "bfloat16"}, False
    transcoder = {"d_out": D + 4, **not_centred}
    yield "transcoder", "transcoder", transcoder, False
    yield "jumprelu_transcoder", "jumprelu_transcoder", transcoder, False
    pursuit = {"max_iterations": K, "residual_threshold": 0.01}
    yield "matching_pursuit", "matching_pursuit", pursuit, False
    for trained in ("batchtopk", "matryoshka_batchtopk"):
        extra = {"matryoshka_widths": [4, F]} if "matr" in trained else {}
        yield f"{trained}_exported", trained, {"k": K, **extra}, False
        yield f"{trained}_as_trained", trained, {"k": K, **extra}, True
    yield "jumprelu_as_trained", "jumprelu", {}, True


def saelens_make(folder: Path) -> None:
    """One folder for each of its architectures."""
    import sae_lens
    from sae_lens.registry import get_sae_class, get_sae_training_class

    for seed, (case, architecture, settings, as_trained) in enumerate(saelens_cases()):
        trains = as_trained or "batchtopk" in architecture
        registered = get_sae_training_class if trains else get_sae_class
        made, configured = registered(architecture)
        sae = made(configured(d_in=D, d_sae=F, **settings))
        shaken(sae, seed)
        if architecture == "matching_pursuit":  # it divides by no norms
            sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.4, dtype=torch.double)
        to, x = folder / case, rows()
        to.mkdir(parents=True)
        if trains:
            sae.save_inference_model(to / "exported")
            if as_trained:
                sae.save_model(to)
            else:
                (to / "exported" / "cfg.json").rename(to / "cfg.json")
                weights = "sae_weights.safetensors"
                (to / "exported" / weights).rename(to / weights)
            known = to / "exported" if as_trained else to
            sae = sae_lens.SAE.load_from_disk(known)
            for left in (to / "exported").glob("*"):
                left.unlink()
            (to / "exported").rmdir()
        else:
            sae.save_model(to)
            sae = sae_lens.SAE.load_from_disk(to, dtype="float32")
        write(to / "expected.npz", x, *saelens_codes(sae, x))
    old_layout(folder / "old_layout_topk", sae_lens)


def old_layout(to: Path, sae_lens: Any) -> None:
    """A description as before version 6, read by the library's own converter."""
    sae = sae_lens.TopKSAE(
        sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=False)
    )
    shaken(sae, 99)
    sae.save_model(to)
    old = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_pre",
        "hook_layer": 3,
        "hook_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 128,
        "dataset_path": "openwebtext",
        "prepend_bos": True,
        "normalize_activations": False,
        "sae_lens_training_version": "3.1.0",
    }
    (to / "cfg.json").write_text(json.dumps(old))
    again, x = sae_lens.SAE.load_from_disk(to), rows()
    write(to / "expected.npz", x, *saelens_codes(again, x))


def saelens_load(folder: Path) -> Any:
    """By its own loader."""
    import sae_lens

    return sae_lens.SAE.load_from_disk(folder)


# sparsify -----------------------------------------------------------------------------


def sparsify_make(folder: Path) -> None:
    """Autoencoders and a transcoder."""
    from sparsify import SparseCoder, SparseCoderConfig

    cases: dict[str, dict[str, Any]] = {
        "topk": {},
        "transcoder": {"transcode": True},
        "not_normalised": {"normalize_decoder": False},
        "bfloat16": {},
    }
    for seed, (case, settings) in enumerate(cases.items()):
        dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
        config = SparseCoderConfig(num_latents=F, k=K, **settings)
        coder = SparseCoder(D, config, dtype=torch.float32)
        shaken(coder, seed)
        to, x = folder / case / "layers.5", rows()
        coder.to(dtype).save_to_disk(to)
        coder = SparseCoder.load_from_disk(to).float()
        write(folder / case / "expected.npz", x, *sparsify_codes(coder, x))


def sparsify_codes(coder: Any, x: torch.Tensor) -> tuple[Any, Any]:
    """Its codes made dense, and what it decodes them to."""
    with torch.no_grad():
        out = coder.encode(x)
        dense = torch.zeros(len(x), coder.num_latents)
        dense.scatter_(1, out.top_indices, out.top_acts)
        return dense, coder.decode(out.top_acts, out.top_indices)


def sparsify_load(folder: Path) -> Any:
    """By its own loader."""
    from sparsify import SparseCoder

    return SparseCoder.load_from_disk(folder)


# dictionary_learning ------------------------------------------------------------------


def dictionary_learning_make(folder: Path) -> None:
    """All its classes, saved as its training saves them."""
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import (
        MatryoshkaBatchTopKSAE,
    )
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = [
        dictionary.AutoEncoder(D, F),
        dictionary.AutoEncoderNew(D, F),
        dictionary.GatedAutoEncoder(D, F),
        dictionary.JumpReluAutoEncoder(D, F),
        AutoEncoderTopK(D, F, K),
        BatchTopKSAE(D, F, K),
        MatryoshkaBatchTopKSAE(D, F, K, [4, F - 4]),
    ]
    for seed, sae in enumerate(made):
        shaken(sae, seed)
        name = type(sae).__name__
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.4)
        to, x = folder / name, rows()
        to.mkdir(parents=True)
        torch.save(sae.state_dict(), to / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F}
        trainer |= {"layer": 3, "lm_name": "EleutherAI/pythia-70m"}
        trainer |= {"submodule_name": "resid_post_layer_3"}
        described = {"trainer": trainer, "buffer": {"ctx_len": 128}}
        (to / "config.json").write_text(json.dumps(described))
        with torch.no_grad():
            codes = sae.encode(x)
            write(to / "expected.npz", x, codes, sae.decode(codes))


PEERS: dict[str, tuple[str, Callable[[Path], None], Any, Any]] = {
    "saelens": ("sae-lens", saelens_make, saelens_load, saelens_codes),
    "sparsify": ("eai-sparsify", sparsify_make, sparsify_load, sparsify_codes),
    "dictionary_learning": (
        "dictionary-learning",
        dictionary_learning_make,
        None,
        None,
    ),
    "gemma_scope": ("sae-lens", gemma_scope_make, None, None),
    "openai": ("torch", openai_make, None, None),
}


def main(peer: str, task: str, folder: Path) -> None:
    """Makes or reads."""
    library, make, load, codes_of = PEERS[peer]
    if task == "make":
        make(folder)
    for case in sorted(folder.glob("*/x.npy")) if task == "read" else ():
        x = torch.from_numpy(np.load(case))
        sae = load(case.parent / "sae")
        write(case.parent / "found.npz", x, *codes_of(sae, x))
    versions = {n: importlib.metadata.version(n) for n in {library, "torch"}}
    print(json.dumps(versions))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
