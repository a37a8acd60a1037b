"""The SAEs that are trained, and the activations that they are trained on."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array

from sae_jax import checks
from sae_jax.lm.sites import gradient_of
from sae_jax.model import SAE
from sae_jax.training.step import Batch
from sae_jax.variables import Variables

Rows = Mapping[str, Array]


@runtime_checkable
class Stream(Protocol):
    """Batches of activations `{site: [B, D]}`; see `sae_jax.activations`.

    Rows of the model's gradient may come beside, by the name `gradient_of(site)`.
    One that was opened with a share (`sae_jax.share`) gives its rows of each batch;
    `batch` is the size of the whole.
    """

    batch: int

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site, and of each gradient by its name."""
        ...

    def batches(self, start: int = 0, position: Any = None) -> Iterator[Any]:
        """Batches from number `start` on."""
        ...

    def position(self, t: int) -> Any:
        """What leads back to batch `t`."""
        ...


class Member(NamedTuple):
    """One of the SAEs.

    Attributes:
      sae: its description.
      site: what it reads.
      target: the site that a transcoder writes.
      seed: decides its start and whatever is random in its training.
      start: arrays to start from; by default fresh ones.
      lr: a learning rate of its own, in place of the recipe's.
    """

    sae: SAE
    site: str
    target: str | None = None
    seed: int = 0
    start: Variables | None = None
    lr: float | None = None

    def batch(self, rows: Rows) -> Batch:
        """Its part of a batch."""
        batch: Batch = {"x": rows[self.site]}
        if self.target is not None:
            batch["target"] = rows[self.target]
        if self.needs_gradient:
            batch["grad"] = rows[gradient_of(self.site)]
        return batch

    @property
    def needs_gradient(self) -> bool:
        """Whether its rule looks at the gradient of the model's loss."""
        return "grad_x" in self.sae.bound.rule.needs

    def faults(self, widths: Mapping[str, int]) -> Iterator[str]:
        """What does not fit the sites that there are."""
        if (self.target is None) == self.sae.is_transcoder:
            yield "a transcoder, and only a transcoder, has a target site."
        yield from filter(None, [checks.value_fault("lr", self.lr, float | None)])
        wanted = [(self.site, self.sae.d_in), (self.target, self.sae.width_out)]
        if self.needs_gradient and self.site in widths:
            name = gradient_of(self.site)
            if name in widths:
                wanted.append((name, self.sae.d_in))
            else:
                yield (
                    f"its rule needs the model's gradient at {self.site}, and the "
                    f"activations come without: give Harvester gradients="
                    f"({self.site!r},), a harvest --gradients=true, or arrays {name!r}."
                )
        for site, width in wanted:
            if site is None:
                continue
            if site not in widths:
                yield f"no site {site!r}; there are {', '.join(widths)}."
            elif widths[site] != width:
                yield f"{site} is {widths[site]} wide, the SAE is made for {width}."
