"""The formats in which SAEs are saved: a table of records, one for each.

`trained` adds the record of our own format, `exchange` those of other libraries.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sae_jax import registry


class Place(NamedTuple):
    """Where an SAE lies.

    Attributes:
      folder: the folder that holds its files.
      given: names of the files that may be meant: all of the folder, or the one that
        was given by its own path.
    """

    folder: Path
    given: frozenset[str]

    def has(self, name: str) -> bool:
        """Whether the folder holds a file of this name, given or beside it."""
        return (self.folder / name).is_file()


@dataclasses.dataclass(frozen=True, eq=False)
class Format:
    """All that the package knows of a format.

    Attributes:
      name: what `save` and `push_to_hub` call it.
      holds: its files, in words, for messages.
      recognises: whether a place holds it; looks at names alone.
      read: the `TrainedSAE` at a place, or a `ValueError` that says what is wrong.
      write: fills an empty folder; None where the format is only read.
      files: the names that `write` leaves.
    """

    name: str
    holds: str
    recognises: Callable[[Place], bool]
    read: Callable[[Place], Any]
    write: Callable[[Any, Path], None] | None = None
    files: frozenset[str] = frozenset()


FORMATS: registry.Table[Format] = registry.Table("format")


def register(known: Format) -> Format:
    """Makes a format known to `load` and `save`."""
    return FORMATS.register(known.name, known)


def writable(name: str) -> Format:
    """The record of a format that can be written."""
    known = FORMATS[name]
    if known.write is None:
        can = ", ".join(other for other in FORMATS if FORMATS[other].write)
        raise ValueError(
            f"The format {name!r} is read, not written; take one of {can}."
        )
    return known
