"""Documents packed into contexts of one length, resumable at every context.

Joined (the default), documents follow one another, each after a BOS, and contexts are
cut from that row: attention reaches over a BOS into the document before. Apart, each
document is cut into contexts of its own, each of them begun with BOS, the last one
padded. A document longer than a context is cut in both; an empty one is skipped. Whole,
each document is one context as it is, without a BOS that it does not bring, and what is
longer than a context is left out: so FAST (Li et al. 2025, arXiv:2506.07691) runs
dialogues, each alone and as the chat template makes it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_jax import checks
from sae_jax.text.dialogues import is_dialogue, rendered
from sae_jax.text.documents import Document, Documents


class Context(NamedTuple):
    """One context, and where to begin in order to get it again.

    `real` is false at padding; `use` also where the activations are not wanted.
    """

    tokens: Int[np.ndarray, " T"]
    real: Bool[np.ndarray, " T"]
    use: Bool[np.ndarray, " T"]
    position: Any


class Packing(NamedTuple):
    """How documents become contexts.

    Attributes:
        length: Tokens per context.
        join: Whether a context may hold several documents.
        whole: Whether each document is one context, as it is; not with `join`.
        use_bos: Whether activations at BOS are used; in GPT-2 they are known to have
            norms far above those of other positions.
        skip: How many positions at the start of every context are not used. The first
            position draws attention, and a large norm, whatever its token is.
        repeat: Whether to begin again when the documents end.
    """

    length: int = 128
    join: bool = True
    use_bos: bool = False
    skip: int = 0
    repeat: bool = True
    whole: bool = False

    def faults(self) -> Iterator[str]:
        """What no text can be cut by."""
        if self.join and self.whole:
            yield "whole=True runs documents one by one; give join=False with it"
        if self.length < 2 or not 0 <= self.skip < self.length:
            yield f"length={self.length} must be at least 2, and skip={self.skip} less"


class _Piece(NamedTuple):
    """The part of a document that is not used yet."""

    position: Any
    done: int
    tokens: np.ndarray


def contexts(
    documents: Documents, tokenizer: Any, packing: Packing, position: Any = None
) -> Iterator[Context]:
    """Contexts, from the start or from the `position` of one that was seen before."""
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = tokenizer.eos_token_id
    if bos is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token")
    checks.raise_all(packing.faults())
    pieces = _pieces(documents, tokenizer, bos, packing, position)
    cut = _joined if packing.join else _whole if packing.whole else _apart
    last_used = None
    for tokens, begin in cut(pieces, bos, packing.length):
        padded = np.full(packing.length, bos, np.int32)
        padded[: len(tokens)] = tokens
        real = np.arange(packing.length) < len(tokens)
        use = real & (np.arange(packing.length) >= packing.skip)
        if not packing.use_bos:
            use &= padded != bos
        epoch = begin[0][0]
        if use.any() or last_used is None:
            last_used = epoch
        elif epoch > last_used + 1:
            raise ValueError(
                f"no position of the whole text is used: all are BOS, padding, or "
                f"among the first skip={packing.skip}"
            )
        yield Context(padded, real, use, begin)


def _pieces(documents, tokenizer, bos, packing, position) -> Iterator[_Piece]:
    """Tokenised documents; the first may be one that was begun before."""
    where, done = position if position is not None else (None, 0)
    empty_epochs = 0
    while True:
        n_tokens = 0
        for begin, document in documents.read(where):
            try:
                tokens = encode(document, tokenizer)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"document {begin[1]} cannot be made tokens of: {error}"
                ) from error
            if len(tokens) and packing.join and tokens[0] != bos:
                tokens = np.concatenate([[bos], tokens]).astype(np.int32)
            n_tokens += int((tokens != bos).sum())
            if len(tokens) > done:
                yield _Piece(begin, done, tokens[done:])
            done = 0
        if not packing.repeat:
            return
        empty_epochs = 0 if n_tokens else empty_epochs + 1
        if empty_epochs == 2:
            raise ValueError("the dataset holds no text: all its documents are empty")
        where = documents.after(where)


def encode(document: Document, tokenizer: Any) -> np.ndarray:
    """Token ids, without special tokens but those that stand in the text.

    In that of a dialogue its template has put them.
    """
    if is_dialogue(document):
        document = rendered(document, tokenizer)  # type: ignore[arg-type]
    if isinstance(document, str):
        document = tokenizer(document, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    return np.asarray(document, np.int32)


def _joined(pieces, bos, length) -> Iterator[tuple[np.ndarray, Any]]:
    """Contexts cut from the row of all documents; only the very last may be short."""
    row: deque[_Piece] = deque()
    size = 0
    for piece in pieces:
        row.append(piece)
        size += len(piece.tokens)
        while size >= length:
            yield _take(row, length)
            size -= length
    if size:
        yield _take(row, size)


def _take(row: deque[_Piece], n: int) -> tuple[np.ndarray, Any]:
    """The first n tokens, and the position at which they began."""
    begin = [row[0].position, row[0].done]
    taken = []
    while n:
        piece = row.popleft()
        head, rest = piece.tokens[:n], piece.tokens[n:]
        taken.append(head)
        n -= len(head)
        if len(rest):
            row.appendleft(_Piece(piece.position, piece.done + len(head), rest))
    return np.concatenate(taken), begin


def _apart(pieces, bos, length) -> Iterator[tuple[np.ndarray, Any]]:
    """Contexts of one document each, every one after a BOS."""
    for piece in pieces:
        own_bos = int(piece.done == 0 and piece.tokens[0] == bos)
        for start in range(own_bos, len(piece.tokens), length - 1):
            part = piece.tokens[start : start + length - 1]
            yield np.concatenate([[bos], part]), [piece.position, piece.done + start]


def _whole(pieces, bos, length) -> Iterator[tuple[np.ndarray, Any]]:
    """A context of each document, which is cut off where it is longer."""
    for piece in pieces:
        yield piece.tokens[:length], [piece.position, piece.done]
