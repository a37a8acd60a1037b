"""Documents, one after the other, from a place that can be returned to.

A document is its text, or a dialogue of messages, or its token ids where a column holds
them already. Every
document belongs to one part, by a hash of its name (its path below the folder, or its
row number), so that there is held-out text where a dataset brings none.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sae_jax.text import corpus
from sae_jax.text.dialogues import Message

Document = str | list[int] | list[Message]
Part = Literal["train", "validation", "heldout", "all"]


@runtime_checkable
class Documents(Protocol):
    """What a source of text offers.

    A position is a list of plain values that JSON can hold; the first is the epoch.
    """

    def fingerprint(self) -> str:
        """A checksum that tells most other texts from this one, without reading all."""
        ...

    def read(self, position: Any = None) -> Iterator[tuple[Any, Document]]:
        """One epoch's documents from `position` on, each with its own position."""
        ...

    def after(self, position: Any) -> Any:
        """The start of the epoch that follows the one of `position`."""
        ...


class Files(NamedTuple):
    """Whole files, in an order of seed and epoch; a position is [epoch, index]."""

    names: list[str]
    open: Callable[[str], str]
    seed: int

    def fingerprint(self) -> str:
        """Of the names, in order, and the seed."""
        return checksum("\n".join([str(self.seed), *self.names]))

    def read(self, position: Any = None) -> Iterator[tuple[Any, Document]]:
        """See `Documents`."""
        epoch, start = position or (0, 0)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.names))
        for index in range(start, len(order)):
            yield [epoch, index], self.open(self.names[order[index]])

    def after(self, position: Any) -> Any:
        """See `Documents`."""
        return [(position or (0, 0))[0] + 1, 0]


class Rows(NamedTuple):
    """A streamed dataset in its own order, in every epoch alike; null is empty text.

    A position is [epoch, row, the stream's state]. The stream is never shuffled by
    `datasets`, whose shuffle buffer is lost on a resume; activations are shuffled.
    """

    name: str
    stream: Any
    column: str
    part: Part

    def fingerprint(self) -> str:
        """Of the first row, the column and the part."""
        first = next(iter(copy.deepcopy(self.stream)))
        return checksum(f"{self.column} {self.part} {first}")

    def read(self, position: Any = None) -> Iterator[tuple[Any, Document]]:
        """See `Documents`."""
        epoch, row, state = position or (0, 0, None)
        stream = copy.deepcopy(self.stream)  # reading changes it
        if state is None:
            state = stream.state_dict()
        else:
            # Until the next row is read, the stream itself would give its old state.
            stream.load_state_dict(copy.deepcopy(state))
        for example in examples(stream, self.name, row):
            if self.part in ("all", corpus.part_of(str(row))):
                yield [epoch, row, state], example.get(self.column) or ""
            row, state = row + 1, stream.state_dict()

    def after(self, position: Any) -> Any:
        """See `Documents`."""
        return [(position or (0, 0, None))[0] + 1, 0, None]


def examples(stream: Any, name: str, row: int) -> Iterator[dict[str, Any]]:
    """The rows of a stream; a fault in its files names the dataset."""
    import datasets

    source = iter(stream)
    while True:
        try:
            example = next(source, None)
        except (
            ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError
        ) as error:  # fmt: skip
            raise ValueError(
                f"dataset={name!r} cannot be read from row {row} on: {error}"
            ) from error
        if example is None:
            return
        yield example
        row += 1


def checksum(text: str) -> str:
    """Sixteen hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
