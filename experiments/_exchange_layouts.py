"""Files in layouts that no library of a registry writes, for `exchange`.

Gemma Scope's, with codes by SAELens's reader of them, and OpenAI's, with codes by the
formulas of its `model.py`. Part of `_exchange_peers`, which see.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

D, F, K = 8, 16, 3


def rows(n: int = 24, seed: int = 0) -> torch.Tensor:
    """Rows with a mean, on no special scale."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((1.5 * rng.normal(size=(n, D)) + 0.3).astype(np.float32))


def write(path: Path, x: torch.Tensor, codes: Any, x_hat: Any) -> None:
    """Rows, codes and reconstructions, in float32."""
    arrays = {"x": x, "codes": codes, "x_hat": x_hat}
    plain = {n: a.detach().float().numpy() for n, a in arrays.items()}
    np.savez(path, **plain)


def saelens_codes(sae: Any, x: torch.Tensor) -> tuple[Any, Any]:
    """By its own `encode` and `forward`."""
    with torch.no_grad():
        return sae.encode(x), sae(x)


def gemma_scope_make(folder: Path) -> None:
    """The published layout, with codes by SAELens's own reader of it.

    Its reader fetches from the hub; here the file is handed to it instead.
    """
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders as loaders

    rng, x = np.random.default_rng(5), rows()
    inside = "layer_3/width_16k/average_l0_10"
    for case in ("residual", "embedding"):
        name = inside if case == "residual" else "embedding/width_4k/average_l0_6"
        to = folder / case / name
        to.mkdir(parents=True)
        arrays = {
            "W_enc": rng.normal(size=(D, F)),
            "W_dec": rng.normal(size=(F, D)),
            "b_enc": 0.3 * rng.normal(size=F),
            "b_dec": 0.3 * rng.normal(size=D),
            "threshold": rng.uniform(0.2, 0.9, F),
        }
        arrays = {n: a.astype(np.float32) for n, a in arrays.items()}
        np.savez(to / "params.npz", **arrays)  # type: ignore[arg-type]
        loaders.hf_hub_download = lambda to=to, **_: str(to / "params.npz")
        config, state, _ = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", name, cfg_overrides={"d_in": D, "d_sae": F}
        )
        config = loaders.handle_config_defaulting(config)
        sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig.from_dict(config))
        sae.load_state_dict(state)
        write(folder / case / "expected.npz", x, *saelens_codes(sae, x))
    gemma_scope_2(folder / "gemma_3", loaders, sae_lens)


def gemma_scope_2(folder: Path, loaders: Any, sae_lens: Any) -> None:
    """The same for the second layout, in safetensors."""
    from safetensors.torch import save_file

    torch.manual_seed(6)
    to, x = folder / "resid_post" / "layer_7_width_16k_l0_small", rows()
    to.mkdir(parents=True)
    state = {
        "w_enc": torch.randn(D, F),
        "w_dec": torch.randn(F, D),
        "b_enc": 0.3 * torch.randn(F),
        "b_dec": 0.3 * torch.randn(D),
        "threshold": 0.2 + 0.7 * torch.rand(F),
    }
    save_file(state, to / "params.safetensors")
    described = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}
    (to / "config.json").write_text(json.dumps(described))
    loaders.hf_hub_download = lambda *a, **k: str(
        to / ("config.json" if "config.json" in str(a) else "params.safetensors")
    )
    loaders.get_safetensors_tensor_shapes = lambda *a: {
        n: list(t.shape) for n, t in state.items()
    }
    config, found, _ = loaders.gemma_3_sae_huggingface_loader(
        "google/gemma-scope-2-270m-pt", "resid_post/layer_7_width_16k_l0_small"
    )
    config = loaders.handle_config_defaulting(config)
    sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig.from_dict(config))
    sae.load_state_dict(found)
    write(folder / "expected.npz", x, *saelens_codes(sae, x))


def openai_make(folder: Path) -> None:
    """The layout of OpenAI's files; its code is on no registry: the maths is here."""
    torch.manual_seed(7)
    for case in ("ReLU", "TopK"):
        x = rows()
        state: dict[str, Any] = {
            "pre_bias": 0.3 * torch.randn(D),
            "latent_bias": 0.3 * torch.randn(F),
            "encoder.weight": torch.randn(F, D),
            "decoder.weight": torch.randn(D, F),
            "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
            "latents_activation_frequency": torch.ones(F),
            "latents_mean_square": torch.zeros(F),
            "activation": case,
        }
        if case == "TopK":
            state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
        (folder / case).mkdir(parents=True)
        torch.save(state, folder / case / "autoencoder.pt")
        mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        seen = (x - mean) / (spread + 1e-5) if case == "TopK" else x
        pre = (seen - state["pre_bias"]) @ state["encoder.weight"].T
        codes = torch.relu(pre + state["latent_bias"])
        if case == "TopK":
            top = codes.topk(K, dim=1)
            codes = torch.zeros_like(codes).scatter(1, top.indices, top.values)
        x_hat = codes @ state["decoder.weight"].T + state["pre_bias"]
        x_hat = x_hat * spread + mean if case == "TopK" else x_hat
        write(folder / case / "expected.npz", x, codes, x_hat)
