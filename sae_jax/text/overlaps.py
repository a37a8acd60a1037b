"""Texts without those that repeat a part of an earlier one.

Of two texts that share n words in a row the first is kept (FAST: n = 20). Differs: what
the paper counts as a word is not known; here it is what stands between white space. A
text of fewer words counts as one such row, so that it is dropped where it comes again.
"""

import hashlib
from collections.abc import Iterable, Iterator


def kept(texts: Iterable[str], n: int = 20) -> Iterator[bool]:
    """Whether each text is kept; 16 bytes or so are held for each of their words."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    seen: set[bytes] = set()
    for text in texts:
        rows = set(_rows(text.split(), n))
        new = seen.isdisjoint(rows)
        if new:  # what was dropped drops no other
            seen |= rows
        yield new


def _rows(words: list[str], n: int) -> Iterator[bytes]:
    """A checksum of every n words in a row."""
    for start in range(max(len(words) - n, 0) + 1):
        row = " ".join(words[start : start + n]).encode("utf-8", "surrogateescape")
        yield hashlib.blake2b(row, digest_size=8).digest()
