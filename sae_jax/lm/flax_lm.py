"""Transformers' Flax language models as pure functions with named sites.

    lm = FlaxLM.load("gpt2")
    run = lm.run(tokens, read=("resid_post.8",), losses=True)
    run = lm.run(tokens, write={"mlp_out.3": ablate()}, logits=True)
    run, grads = lm.gradients(tokens, ("resid_pre.8",))

Sites are reached by intercepting Flax's modules, so the model's code is transformers'
own. Under jit the compiler drops every layer that nothing asked for depends on.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from transformers.utils import ModelOutput

from sae_jax.lm.edits import Edit, add
from sae_jax.lm.files import fingerprint, model_folder
from sae_jax.lm.flax_weights import build, load_config, load_params
from sae_jax.lm.sites import Run, Tokens, Visit
from sae_jax.lm.source import Source


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxLM(Source):
    """A causal language model: its module and family; `params` travel beside.

    Attributes:
        name: What it was loaded from.
        module: Transformers' Flax module.
        config: Transformers' configuration.
        params: All weights, float32.
        dtype: The type of all computation and of the values that are read.
    """

    name: str
    module: nn.Module
    config: Any
    params: Any
    dtype: str = "float32"

    @classmethod
    def load(cls, name: str = "embedded", *, dtype: str = "float32") -> "FlaxLM":
        """Loads 'embedded', a local folder, or a Hugging Face id, without torch."""
        return cls.from_folder(model_folder(name), name=name, dtype=dtype)

    @classmethod
    def from_folder(cls, folder: Path, *, name: str, dtype: str) -> "FlaxLM":
        """Loads a folder in the Hugging Face layout."""
        config = load_config(folder)
        model = build(config, dtype, _do_init=False)
        return cls(name, model.module, config, load_params(folder, model), dtype)

    @classmethod
    def outline(cls, name: str = "embedded", *, dtype: str = "float32") -> "FlaxLM":
        """The model without its weights, only their shapes: for sites and widths."""
        config = load_config(model_folder(name, weights=False))
        model = build(config, dtype, _do_init=False)
        return cls(name, model.module, config, model.params_shape_tree, dtype)

    @classmethod
    def random(cls, config: Any, *, seed: int = 0, dtype: str = "float32") -> "FlaxLM":
        """A model with random weights, for tests and benchmarks."""
        model = build(config, dtype, seed=seed)
        return cls("random", model.module, config, model.params, dtype)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the weights: whether two models are the same."""
        return fingerprint(self.params)

    def width(self, site: str) -> int:
        """The last dimension of a site's value."""
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        shapes = jax.eval_shape(
            partial(self.forward, read=(site,)), self.params, tokens
        )
        return shapes.values[site].shape[-1]

    def forward(
        self,
        params: Any,
        tokens: Tokens,
        *,
        read: Iterable[str] = (),
        write: Mapping[str, Callable[[Array], Array]] | None = None,
        logits: bool = False,
        losses: bool = False,
    ) -> Run:
        """The pure function: tokens in, the values of sites out; see `Source.run`."""
        write = dict(write or {})
        read = tuple(read)
        visit = Visit(self.taps((*read, *write)), read, write)

        def intercept(call, args, kwargs, context):
            module = ".".join(context.module.path)
            if context.method_name != "__call__" or module not in visit.modules:
                return call(*args, **kwargs)
            result: Any = call(visit.enter(module, args[0]), *args[1:], **kwargs)
            if isinstance(result, ModelOutput):
                first = next(iter(result))
                value = visit.leave(module, result[first])
                return dataclasses.replace(cast(Any, result), **{first: value})
            if isinstance(result, tuple):
                return (visit.leave(module, result[0]), *result[1:])
            return visit.leave(module, result)

        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        with nn.intercept_methods(intercept):
            out: Any = self.module.apply(
                {"params": params}, tokens, jnp.ones_like(tokens), positions
            )
        visit.require_all_seen()
        return Run(
            {site: visit.values[site] for site in read},
            out.logits if logits else None,
            next_token_losses(out.logits, tokens) if losses else None,
        )

    def run(
        self,
        tokens: Tokens,
        *,
        read: Iterable[str] = (),
        write: Mapping[str, Edit] | None = None,
        logits: bool = False,
        losses: bool = False,
    ) -> Run:
        """`forward`, compiled, with the model's own weights."""
        self.require_fit(tokens)
        return self._compiled(
            self.params, tokens, tuple(read), dict(write or {}), logits, losses
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
        self.require_fit(tokens)
        return self._compiled_gradients(
            self.params, tokens, tuple(sites), dict(write or {}), weights
        )

    @cached_property
    def _compiled(self):
        def forward(params, tokens, read, write, logits, losses):
            return self.forward(
                params, tokens, read=read, write=write, logits=logits, losses=losses
            )

        return jax.jit(forward, static_argnums=(2, 4, 5))

    @cached_property
    def _compiled_gradients(self):
        def gradients(params, tokens, sites, write, weights):
            shapes = jax.eval_shape(partial(self.forward, read=sites), params, tokens)

            def loss(shifts):
                edits: dict[str, Callable[[Array], Array]] = dict(write)
                for site in sites:
                    edits[site] = _Then(write.get(site), add(shifts[site]))
                run = self.forward(params, tokens, read=sites, write=edits, losses=True)
                losses: Any = run.losses
                return jnp.sum(losses if weights is None else losses * weights), run

            zeros = {s: jnp.zeros(v.shape, v.dtype) for s, v in shapes.values.items()}
            grads, run = jax.grad(loss, has_aux=True)(zeros)
            return run, grads

        return jax.jit(gradients, static_argnums=2)


@dataclasses.dataclass(frozen=True)
class _Then:
    """One edit after another."""

    first: Callable[[Array], Array] | None
    second: Callable[[Array], Array]

    def __call__(self, old: Array) -> Array:
        return self.second(old if self.first is None else self.first(old))


def next_token_losses(
    logits: Float[Array, "B T V"], tokens: Tokens
) -> Float[Array, "B T-1"]:
    """The loss in nats of each token but the first, computed in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
