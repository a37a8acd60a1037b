"""Batches from a language model that runs beside the SAE.

The text is dealt to readers; `sae_jax.activations.reader` says how each mixes its rows.
A batch is what all of them read, one after another. A process has the readers of its
share and nothing of the others, whose text it neither tokenises nor gives to the model.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import checks
from sae_jax.activations.harvester import Harvester
from sae_jax.activations.mixing import MIXINGS, Mixed
from sae_jax.activations.reader import Reader
from sae_jax.share import PLACES, WHOLE, Share
from sae_jax.text.blocks import Place
from sae_jax.text.contexts import Packing
from sae_jax.text.dealt import Dealt
from sae_jax.text.documents import Documents


class OnTheFly:
    """A stream of batches `{site: [batch, width]}`.

    At most three times `buffer` rows are held, of which a share has its part.

    Args:
        harvester: The model and the sites.
        documents: The text.
        tokenizer: The model's tokenizer.
        packing: How documents become contexts.
        batch: Rows per batch, those of other shares included.
        buffer: Rows per block, of all readers together; an even multiple of `batch`.
        seed: Decides the order of the rows.
        readers: Among how many the documents are dealt. Another number makes other
            batches; another number of shares does not.
        share: Which rows of each batch, and so which readers, are this process's.
        mixing: Which blocks' rows meet in a batch; see `sae_jax.activations.mixing`.
    """

    def __init__(
        self,
        harvester: Harvester,
        documents: Documents,
        tokenizer: Any,
        packing: Packing,
        *,
        batch: int,
        buffer: int,
        seed: int = 0,
        readers: int = 1,
        share: Share = WHOLE,
        mixing: Mixed = "neighbours",
    ):
        if buffer % (2 * batch) or buffer <= 0:
            raise ValueError(
                f"buffer={buffer} must be a multiple of twice the batch, {2 * batch}"
            )
        if readers < 1 or batch % readers:
            raise ValueError(
                f"readers={readers} must be at least 1 and divide the batch, {batch}"
            )
        if mixing not in MIXINGS:
            raise ValueError(checks.unknown("mixing", mixing, MIXINGS))
        checks.raise_all(share.faults(readers=readers))
        if share.count > 1 and not packing.repeat:
            raise ValueError(
                "repeat=False: readers' texts end at different batches, of which other "
                "processes do not know; let a text that is shared repeat"
            )
        self.harvester, self.batch, self.buffer = harvester, batch, buffer
        self.readers = readers
        # What decides a batch, besides its number and that of the readers.
        self._made_by = {
            **harvester.made_by,
            "text": documents.fingerprint(),
            "packing": packing._asdict(),
            "batch": batch,
            "buffer": buffer,
            "seed": seed,
            "mixing": mixing,
        }
        key, alone = jax.random.key(seed), readers == 1
        own = readers // share.count
        self._own = {
            number: Reader(
                harvester,
                documents if alone else Dealt(documents, number, readers),
                tokenizer,
                packing,
                batch=batch // readers,
                buffer=buffer // readers,
                key=key if alone else jax.random.fold_in(key, number),
                mixing=mixing,
            )
            for number in range(share.index * own, (share.index + 1) * own)
        }

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        return self.harvester.widths

    def batches(
        self, start: int = 0, position: Any = None
    ) -> Iterator[dict[str, Float[Array, "_ D"]]]:
        """Batches from number `start` on, or this share of them.

        With the `position(start)` of an earlier run, joined if it had shares, the text
        before it is not read again; without, it is tokenised but not given to the
        model. Ends when the text of a reader ends, with what does not fill a block left
        over.
        """
        if start < 0:
            raise ValueError(f"start={start} must not be negative")
        places = {} if position is None else self._places(start, position)
        parts = [
            reader.batches(start, places.get(number))
            for number, reader in self._own.items()
        ]
        return map(_together, zip(*parts, strict=False))

    def _places(self, start: int, position: Any) -> dict[int, Place | None]:
        """The places of this share's readers, from the position of all."""
        differ = checks.changed(position.get("made_by"), self._made_by)
        if differ:
            raise ValueError(
                f"the position belongs to another stream: {differ}. (The text "
                f"changes with its files, and 'embedded' with the Python)"
            )
        then = position.get("readers", 1)
        if then != self.readers:
            raise ValueError(
                f"the position belongs to another stream: readers was {then} and is "
                f"{self.readers}, which deals the text anew; give readers={then}"
            )
        group = start // (self.buffer // self.batch)
        if position["group"] != group:
            raise ValueError(
                f"position is that of group {position['group']}, batch {start} is in "
                f"{group}"
            )
        places = position[PLACES] if then > 1 else {"0": position["place"]}
        if len(places) != then:
            raise ValueError(
                f"the position tells of readers {', '.join(places)} of {then}: it is "
                f"that of a share. Join those of all, by sae_jax.share.joined"
            )
        return {
            number: None if (place := places[str(number)]) is None else Place(*place)
            for number in self._own
        }

    def position(self, t: int) -> Any:
        """What `batches(t, position)` needs to begin at once; JSON can hold it.

        Known for the batches around the last one that was drawn. That of a share tells
        of its own readers; `sae_jax.share.joined` makes one of those of all shares.
        """
        position = {"made_by": self._made_by, "group": t // (self.buffer // self.batch)}
        places = {
            str(number): None if (place := reader.place(t)) is None else list(place)
            for number, reader in self._own.items()
        }
        if self.readers == 1:
            return {**position, "place": places["0"]}
        return {**position, "readers": self.readers, PLACES: places}


@jax.jit
def _together(parts):
    """The rows of all readers, in the readers' order."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)
