"""Data inside a page: arrays in compressed chunks; texts of tokens, each once.

A chunk is an element that no browser shows or runs:

    <script type="application/octet-stream" id="..." data-layout="...">BASE64</script>

It holds arrays one after another, compressed by zlib. Its layout lists the name, type
and length of each, so that `unpack` of `page.js` needs to know nothing else.
"""

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, Num, UInt

# Characters that would break a line or not show at all.
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), 127)} | {9: "⇥", 10: "↵"}

# The letters that byte-level vocabularies write bytes as (Radford et al. 2019): bytes
# that Latin-1 prints are their own letters, the others those from 256 on, in order.
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = sorted({*range(256)} - {*PRINTED})
BYTE_OF = {chr(b): b for b in PRINTED} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def chunk(name: str, **arrays: Num[np.ndarray, "..."]) -> str:
    """The element that holds these arrays, flat."""
    layout = json.dumps([(k, a.dtype.name, a.size) for k, a in arrays.items()])
    data = b"".join(
        a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays.values()
    )
    packed = base64.b64encode(zlib.compress(data)).decode()
    return (
        f'<script type="application/octet-stream" id="{escape(name)}" '
        f'data-layout="{escape(layout)}">{packed}</script>'
    )


def narrow(array: Integer[np.ndarray, "*n"]) -> UInt[np.ndarray, "*n"]:
    """Numbers that are not negative, in the smallest type that holds them."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


class Texts:
    """The texts of tokens that a page shows, and its contexts, each kept once.

    SAEs of one run share contexts, and use a part of the vocabulary.
    """

    def __init__(self) -> None:
        self._places = {"": 0}  # where there is no token
        self._contexts: list[UInt[np.ndarray, "N T"]] = []

    def places(
        self, tokens: Int[np.ndarray, "*n"], token_texts: Sequence[str]
    ) -> UInt[np.ndarray, "*n"]:
        """Where the text of each token stands in the page's list; 0 for token -1.

        A model's vocabulary may be longer than its tokenizer's: such tokens are
        shown by number.
        """
        used, inverse = np.unique(tokens, return_inverse=True)
        texts = [
            "" if i < 0 else token_texts[i] if i < len(token_texts) else f"[{i}]"
            for i in used.tolist()
        ]
        return self.words(texts)[inverse].reshape(tokens.shape)

    def words(self, texts: Sequence[str]) -> UInt[np.ndarray, " n"]:
        """Where each of these texts stands in the page's list."""
        places = [self._places.setdefault(t, len(self._places)) for t in texts]
        return narrow(np.array(places, np.int64))

    def contexts(
        self, tokens: Int[np.ndarray, "N T"], token_texts: Sequence[str]
    ) -> int:
        """The number of these contexts among those that the page keeps."""
        places = self.places(tokens, token_texts)
        for number, kept in enumerate(self._contexts):
            if np.array_equal(kept, places):
                return number
        self._contexts.append(places)
        return len(self._contexts) - 1

    def chunks(self) -> Iterator[str]:
        """The list of texts, as JSON, and all contexts."""
        listed = json.dumps([*self._places], ensure_ascii=False).encode()
        yield chunk("texts", json=np.frombuffer(listed, np.uint8))
        for number, tokens in enumerate(self._contexts):
            width = np.array([tokens.shape[1]])
            yield chunk(f"contexts{number}", tokens=tokens, width=narrow(width))


def token_texts(tokenizer: Any) -> list[str]:
    r"""The text of each token of a vocabulary, for reading.

    Byte-level tokens are read as UTF-8; bytes that are not whole characters stand as
    `\xe2`. Line ends and tabs are shown as marks, other control characters as `\x00`.
    In SentencePiece vocabularies the mark of a space becomes one.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # Each of the 256 letters is a token of its own where the vocabulary is byte-level.
    byte_level = {*BYTE_OF} <= {*pieces}

    def text(number: int, piece: str | None) -> str:
        if piece is None:  # a gap in the vocabulary
            return f"[{number}]"
        if byte_level and {*piece} <= {*BYTE_OF}:
            data = bytes(BYTE_OF[letter] for letter in piece)
        elif len(piece) == 6 and piece.startswith("<0x") and not byte_level:
            data = bytes.fromhex(piece[3:5])
        else:
            data = piece.replace("▁", " ").encode()
        return data.decode("utf-8", "backslashreplace").translate(CONTROLS)

    return [text(number, piece) for number, piece in enumerate(pieces)]
