"""Any causal language model of transformers, run by PyTorch, with named sites.

    lm = TorchLM.load("EleutherAI/pythia-70m")
    run = lm.run(tokens, read=("resid_post.3",), losses=True)
    run, grads = lm.gradients(tokens, ("resid_pre.3",), write={"mlp_out.1": ablate()})

Sites, edits and results are those of the Flax source: edits are JAX functions, results
JAX arrays. Both sides share memory by DLPack, so that nothing is copied on the device
where the model is. JAX must copy what is not contiguous, what does not start at a
multiple of 64 bytes (a slice, for example), and what is on a device that it lacks.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError

from sae_jax.lm.edits import Edit
from sae_jax.lm.files import fingerprint, model_folder
from sae_jax.lm.sites import Run, Tokens, Visit
from sae_jax.lm.source import Source

try:
    import torch
except ImportError as error:
    raise ImportError("TorchLM needs PyTorch: pip install 'sae_jax[torch]'") from error
from transformers import AutoModelForCausalLM

from sae_jax.lm.torch_hooks import Complete, hooked

# Masks and rotary frequencies, which older versions stored beside the weights.
BUFFERS = ("attn.bias", "attention.bias", ".masked_bias", ".inv_freq")


class TorchLM(Source):
    """A causal language model of transformers.

    Attributes:
        name: What it was loaded from.
        model: Transformers' PyTorch module.
        config: Its configuration; where it also takes images or sound, that for text.
    """

    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model
        self.config = model.config.get_text_config(decoder=True)

    @classmethod
    def load(
        cls, name: str = "embedded", *, dtype: str = "float32", device: str = "cpu"
    ) -> "TorchLM":
        """Loads 'embedded', a local folder, or a Hugging Face id, for evaluation.

        Only safetensors are opened, and no code that comes with a model is run.
        """
        folder = model_folder(name)
        if not all(any(folder.glob(f)) for f in ("config.json", "*.safetensors")):
            raise FileNotFoundError(
                f"{folder} needs config.json and model.safetensors. Pickles (.bin, .pt)"
                f", which can execute code, are not opened: save as safetensors"
            )
        kind: Any = AutoModelForCausalLM
        try:
            model, found = kind.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{folder} cannot be loaded (code of its own is never run): {error}"
            ) from None
        missing = sorted(found["missing_keys"])
        foreign = sorted(k for k in found["unexpected_keys"] if not k.endswith(BUFFERS))
        if missing or foreign:
            raise ValueError(
                f"the weights in {folder} do not fit its config.json. "
                f"Missing: {missing[:3]}. Not known: {foreign[:3]}"
            )
        return cls(name, model.to(device).eval().requires_grad_(False))

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the weights: whether two models are the same."""
        return fingerprint({k: to_jax(v) for k, v in self.model.named_parameters()})

    def width(self, site: str) -> int:
        """The last dimension of a site's value."""
        return self.run(np.zeros((1, 2), np.int32), read=(site,)).values[site].shape[-1]

    def run(
        self,
        tokens: Tokens,
        *,
        read: Iterable[str] = (),
        write: Mapping[str, Edit] | None = None,
        logits: bool = False,
        losses: bool = False,
    ) -> Run:
        """See `Source`; ends at the last site if nothing behind it is asked for."""
        read, inputs = tuple(read), self._inputs(tokens)
        edits = {s: partial(_Edited.apply, edit) for s, edit in (write or {}).items()}
        with torch.inference_mode(False), torch.no_grad():
            visit, out = self._pass(inputs, read, edits, to_end=logits or losses)
            return Run(
                {site: to_jax(visit.values[site]) for site in read},
                to_jax(out) if logits else None,
                to_jax(next_token_losses(out, inputs)) if losses else None,
            )

    def gradients(
        self,
        tokens: Tokens,
        sites: Iterable[str],
        *,
        write: Mapping[str, Edit] | None = None,
        weights: Float[Array | np.ndarray, "B T-1"] | None = None,
    ) -> tuple[Run, dict[str, Array]]:
        """See `Source`."""
        sites, inputs = tuple(sites), self._inputs(tokens)
        edits = {s: partial(_Edited.apply, edit) for s, edit in (write or {}).items()}
        at: dict[str, torch.Tensor] = {}

        def mark(site: str, old: torch.Tensor) -> torch.Tensor:
            new = edits[site](old) if site in edits else old
            new = new if new.requires_grad else new.detach().requires_grad_()
            at[site] = new.clone()  # its own, so that nobody writes in it
            return at[site]

        marks = {site: partial(mark, site) for site in sites}
        with torch.inference_mode(False), torch.enable_grad():
            visit, out = self._pass(inputs, sites, {**edits, **marks}, to_end=True)
            losses = next_token_losses(out, inputs)
            scale = np.array(1.0 if weights is None else weights, np.float32)
            total = (losses * torch.from_numpy(scale).to(losses.device)).sum()
            grads: Any = at and torch.autograd.grad(total, [at[site] for site in sites])
        run = Run({s: to_jax(visit.values[s]) for s in sites}, None, to_jax(losses))
        return run, dict(zip(sites, map(to_jax, grads), strict=True))

    def _inputs(self, tokens: Tokens) -> torch.Tensor:
        ids = np.asarray(tokens).astype(np.int64, casting="safe")
        self.require_fit(ids)
        if self.model.training:
            raise ValueError(f"{self.name!r} trains (dropout): call model.eval() first")
        return torch.from_numpy(ids).to(self.model.device)

    def _pass(
        self,
        inputs: torch.Tensor,
        read: tuple[str, ...],
        write: Mapping[str, Callable[[Any], Any]],
        *,
        to_end: bool,
    ) -> tuple[Visit, Any]:
        """The visit, and the logits if the model ran to its end."""
        taps = self.taps((*read, *write))
        modules = dict(self.model.named_modules(remove_duplicate=False))
        absent = {site: t for site, t in taps.items() if t.module not in modules}
        Visit(absent, (), {}).require_all_seen()
        visit, logits = Visit(taps, read, write), None
        options = {"use_cache"} & {*inspect.signature(self.model.forward).parameters}
        with hooked(modules, visit, stop=not to_end) as versions, suppress(Complete):
            logits = self.model(input_ids=inputs, **dict.fromkeys(options, False))[0]
        visit.require_all_seen()
        spoilt = [s for s, v in versions.items() if visit.values[s]._version != v]
        if spoilt:  # the model wrote into what was read: it gets copies of these
            copies = dict.fromkeys(spoilt, torch.clone)
            return self._pass(inputs, read, {**copies, **write}, to_end=to_end)
        return visit, logits


class _Edited(torch.autograd.Function):
    """An edit, which is a JAX function, as a step of PyTorch's graph."""

    @staticmethod
    def forward(ctx: Any, edit: Edit, old: torch.Tensor) -> torch.Tensor:
        ctx.edit = edit
        ctx.save_for_backward(old)
        value = to_jax(old)
        new = _new(jax.device_put(edit, value.device), value)
        return torch.from_dlpack(new).to(old)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple:
        value, cotangent = to_jax(ctx.saved_tensors[0]), to_jax(cotangents[0])
        old = _back(jax.device_put(ctx.edit, value.device), value, cotangent)
        # A copy: PyTorch sums gradients in place, and JAX may return what it was given.
        return None, torch.from_dlpack(old).to(cotangents[0], copy=True)


_new = jax.jit(lambda edit, old: edit(old))
_back = jax.jit(lambda edit, old, cotangent: jax.vjp(edit, old)[1](cotangent)[0])


def next_token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The loss in nats of each token but the first, computed in float32."""
    scores, labels = logits[:, :-1].float(), tokens[:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), labels.flatten(), reduction="none"
    )
    return losses.view(labels.shape)


def to_jax(value: torch.Tensor) -> Array:
    """The same memory as a JAX array; copied where the top of this file says so."""
    value = value.detach().contiguous()
    try:
        return jax.dlpack.from_dlpack(value)
    except (RuntimeError, TypeError):  # a device that JAX lacks here
        return jax.dlpack.from_dlpack(value.cpu())
