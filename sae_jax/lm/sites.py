"""Where a language model can be read and written: one scheme of names for all.

`place.layer`, layers counted from 0:

    resid_pre.L    the residual stream before block L           [B, T, width]
    head_out.L     the heads' outputs side by side, before the output projection:
                   head h is columns [h d_head, (h+1) d_head)   [B, T, heads d_head]
    attn_out.L     what attention adds                          [B, T, width]
    resid_mid.L    after attention was added                    [B, T, width]
    mlp_hidden.L   hidden units of the MLP, after the activation  [B, T, d_mlp]
    mlp_out.L      what the MLP adds                            [B, T, width]
    resid_post.L   after block L                                [B, T, width]

Anything else is named by its module and side: `transformer.h.3.ln_1:out`. A value read
is what the layers after it see: if the same site is written, the written value. (What
is written at resid_mid reaches them as a change of attn_out, with one rounding more.)

Beside the rows of a site there may be those of its gradient, by the name `gradient_of`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from sae_jax.checks import unknown

Tokens = Int[Array | np.ndarray, "B T"]

PLACES = (
    "resid_pre", "head_out", "attn_out", "resid_mid", "mlp_hidden", "mlp_out",
    "resid_post",
)  # fmt: skip

GRADIENT = "gradient of "  # a blank, which no site has


def gradient_of(site: str) -> str:
    """The name of the model's gradient at a site, among arrays of activations.

    Row t is the gradient, with respect to row t of the site, of the summed losses of
    all later tokens of its context.
    """
    return GRADIENT + site


def without_gradients(names: Iterable[str]) -> tuple[str, ...]:
    """The sites among the names of arrays."""
    return tuple(name for name in names if not name.startswith(GRADIENT))


class Family(NamedTuple):
    """The names of the modules that the places hang on, below a block."""

    block: str
    attention: str
    heads: str
    mlp: str
    hidden: str
    parallel: bool = False  # attention and MLP read the same input: no resid_mid


GPT2 = Family("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj")
NEO = GPT2._replace(heads="attn.attention.out_proj")
NEOX = Family(
    "gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", True
)
LLAMA = Family("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
FAMILIES = {
    "gpt2": GPT2,
    "gpt_neo": NEO,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "gemma": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
}


def family_of(config: Any) -> Family | None:
    """The record for a model's configuration, if its names are known."""
    family = FAMILIES.get(config.model_type)
    if family and hasattr(config, "use_parallel_residual"):
        family = family._replace(parallel=bool(config.use_parallel_residual))
    return family


class Run(NamedTuple):
    """What was asked of one pass.

    `losses[b, t]` is the loss, in nats, of predicting `tokens[b, t + 1]`.
    """

    values: dict[str, Array]
    logits: Array | None
    losses: Array | None


class Tap(NamedTuple):
    """A site as a module path, and what of the module is meant.

    `in` and `out` are its first argument and first result; `sum` is its result added
    to the first argument of the module `base`.
    """

    module: str
    side: Literal["in", "out", "sum"]
    base: str = ""


def site_names(family: Family | None, n_layers: int) -> list[str]:
    """All sites that have a name, in the order in which the model reaches them."""
    if family is None:
        return []
    places = [p for p in PLACES if not (family.parallel and p == "resid_mid")]
    return [f"{place}.{layer}" for layer in range(n_layers) for place in places]


def tap(site: str, family: Family | None, n_layers: int) -> Tap:
    """The module path of a site; refuses what does not exist."""
    module, colon, side = site.partition(":")
    if colon:
        if side not in ("in", "out") or not module:
            raise ValueError(f"site={site!r} is neither 'module:in' nor 'module:out'")
        return Tap(module, side)  # type: ignore[arg-type]
    if family is None:
        raise ValueError(
            f"site={site!r}: the places of this model have no names; name a module, as "
            f"in 'path.to.module:out'"
        )
    place, _, layer = site.partition(".")
    if place not in PLACES:
        raise ValueError(unknown("place", place, PLACES) + f" (site={site!r})")
    if layer not in map(str, range(n_layers)):
        raise ValueError(
            f"site={site!r} needs a layer from 0 to {n_layers - 1}, as in '{place}.0'"
        )
    if family.parallel and place == "resid_mid":
        raise ValueError(
            f"site={site!r}: attention and MLP of this model read the same input, so "
            f"nothing stands between them"
        )
    block = f"{family.block}.{layer}"
    below = {
        "resid_pre": Tap(block, "in"),
        "resid_post": Tap(block, "out"),
        "attn_out": Tap(f"{block}.{family.attention}", "out"),
        "head_out": Tap(f"{block}.{family.heads}", "in"),
        "resid_mid": Tap(f"{block}.{family.attention}", "sum", base=block),
        "mlp_hidden": Tap(f"{block}.{family.hidden}", "in"),
        "mlp_out": Tap(f"{block}.{family.mlp}", "out"),
    }
    return below[place]


class Visit:
    """One pass through a model: applies edits and keeps what is read.

    The source calls `enter` with the first argument of every module in `modules`, and
    `leave` with its first result, and goes on with what they return.
    """

    def __init__(
        self,
        taps: Mapping[str, Tap],
        read: Iterable[str],
        write: Mapping[str, Callable[[Any], Any]],
    ):
        self.read, self.write = frozenset(read), write
        self.taps = taps
        self.values: dict[str, Any] = {}
        self.seen: set[str] = set()
        self._inputs: dict[str, Any] = {}
        self._at: dict[tuple[str, str], list[str]] = {}
        for site, t in taps.items():
            self._at.setdefault((t.module, t.side), []).append(site)
        self.modules = {t.module for t in taps.values()} | {
            t.base for t in taps.values() if t.base
        }

    def enter(self, module: str, x: Any) -> Any:
        """`x`, or what an edit made of it."""
        x = self._edit((module, "in"), x)
        self._record((module, "in"), x)
        self._inputs[module] = x
        return x

    def leave(self, module: str, y: Any) -> Any:
        """`y`, or what an edit made of it."""
        y = self._edit((module, "out"), y)
        self._record((module, "out"), y)
        for site in self._at.get((module, "sum"), ())[:1]:
            base = self._inputs[self.taps[site].base]
            total = self._edit((module, "sum"), y + base)
            if not self.write.keys().isdisjoint(self._at[module, "sum"]):
                y = total - base
            self._record((module, "sum"), y + base)
        return y

    @property
    def complete(self) -> bool:
        """Whether every site was reached, so that the rest of the model is idle."""
        return self.seen == set(self.taps)

    def _edit(self, point: tuple[str, str], value: Any) -> Any:
        for site in self._at.get(point, ()):
            if site in self.write:
                value = self.write[site](value)
        return value

    def _record(self, point: tuple[str, str], value: Any) -> None:
        """After all edits, so that two names of one point read the same."""
        for site in self._at.get(point, ()):
            if site in self.seen:
                raise ValueError(f"site={site!r}: the model calls {point[0]} twice")
            self.seen.add(site)
            if site in self.read:
                self.values[site] = value

    def require_all_seen(self) -> None:
        """Refuses sites whose module the model never called."""
        missed = sorted(set(self.taps) - self.seen)
        if missed:
            raise ValueError(
                f"the model has no module for {', '.join(missed)}, or never calls it"
            )
