"""A text dealt to several readers, document by document, as cards are."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sae_jax.text.documents import Document, Documents, checksum


class Dealt(NamedTuple):
    """Every document whose number in its epoch is `reader` modulo `readers`.

    Those of other readers are read past. A position is [epoch, number, the position in
    the whole text].
    """

    documents: Documents
    reader: int
    readers: int

    def fingerprint(self) -> str:
        """Of the whole text, and which part of it this is."""
        whole = self.documents.fingerprint()
        return checksum(f"{whole} {self.reader} {self.readers}")

    def read(self, position: Any = None) -> Iterator[tuple[Any, Document]]:
        """See `Documents`."""
        _, number, begin = position or (0, 0, None)
        for place, document in self.documents.read(begin):
            if number % self.readers == self.reader:
                yield [place[0], number, place], document
            number += 1
        if number <= self.reader:
            raise ValueError(
                f"the text has {number} documents, too few for readers={self.readers}; "
                f"give a number of readers that each finds a document, or more text"
            )

    def after(self, position: Any) -> Any:
        """See `Documents`."""
        begin = self.documents.after(position[2] if position else None)
        return [begin[0], 0, begin]
