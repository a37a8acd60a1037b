"""What a source of activations is, whichever library runs the model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from sae_jax.lm.edits import Edit
from sae_jax.lm.sites import Family, Run, Tap, Tokens, family_of, site_names, tap


class Source(ABC):
    """A language model whose sites can be read, written and differentiated.

    Attributes:
        name: What it was loaded from.
        config: Transformers' configuration.
    """

    name: str
    config: Any

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A checksum of the weights: whether two models are the same."""

    @abstractmethod
    def width(self, site: str) -> int:
        """The last dimension of a site's value."""

    @abstractmethod
    def run(
        self,
        tokens: Tokens,
        *,
        read: Iterable[str] = (),
        write: Mapping[str, Edit] | None = None,
        logits: bool = False,
        losses: bool = False,
    ) -> Run:
        """One pass: the values of the sites in `read`, after the edits of `write`.

        Every position is attended to by the later ones of its row; contexts that end
        early are padded on the right, which no earlier position sees.
        """

    @abstractmethod
    def gradients(
        self,
        tokens: Tokens,
        sites: Iterable[str],
        *,
        write: Mapping[str, Edit] | None = None,
        weights: Float[Array | np.ndarray, "B T-1"] | None = None,
    ) -> tuple[Run, dict[str, Array]]:
        """The gradients, at sites, of the sum of all next-token losses.

        A sum, so that a row's gradient does not depend on how many rows beside it are
        harvested. `weights` multiplies the losses, for example with 0 at padding.
        """

    @property
    def family(self) -> Family | None:
        """The names of its modules."""
        return family_of(self.config)

    @property
    def n_layers(self) -> int:
        """How many blocks it has."""
        return self.config.num_hidden_layers

    @property
    def context(self) -> int:
        """The longest context it was built for; huge where positions have no end."""
        return getattr(self.config, "max_position_embeddings", None) or 2**31 - 1

    @property
    def sites(self) -> list[str]:
        """All named sites, in the model's order."""
        return site_names(self.family, self.n_layers)

    def taps(self, sites: Iterable[str]) -> dict[str, Tap]:
        """The modules on which sites hang."""
        return {site: tap(site, self.family, self.n_layers) for site in sites}

    def require_fit(self, tokens: Tokens) -> None:
        """Refuses tokens that the model was not built for."""
        if tokens.shape[-1] > self.context:
            raise ValueError(
                f"tokens of length {tokens.shape[-1]} pass the context of "
                f"{self.name!r}, which is {self.context}"
            )
        # Not of arrays on a device, which would have to be waited for.
        if isinstance(tokens, np.ndarray):
            for token in (tokens.max(), tokens.min()):
                if not 0 <= token < self.config.vocab_size:
                    raise ValueError(
                        f"token {token} is outside the vocabulary of {self.name!r}, "
                        f"{self.config.vocab_size}: is it another model's tokenizer?"
                    )
