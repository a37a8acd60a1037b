"""Dialogues: made of this Python's functions, or given; not an experiment."""

import ast
import hashlib
import json
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from sae_jax.text import corpus
from sae_jax.text.dialogues import Message, is_dialogue
from sae_jax.text.documents import Part
from sae_jax.text.opening import open_documents
from sae_jax.text.overlaps import kept
from sae_jax.whole_files import write_whole

PARTS: tuple[Part, ...] = ("train", "heldout")
FILE = "dialogues.jsonl"  # a name that says nothing of a split


def prepared(folder: Path, given: str, overlap: int) -> dict[str, Path]:
    """The dialogues of each part in a folder of its own; written once.

    What is held out is also held out from repeating what is trained on: of two that
    share `overlap` words in a row the first is kept, and training comes first.
    """
    paths = {part: folder / part / FILE for part in PARTS}
    if not all(path.exists() for path in paths.values()):
        whole = [(part, one) for part in PARTS for one in read(given, part)]
        said = (" ".join(m["content"] for m in one) for _, one in whole)
        keep = list(kept(said, overlap)) if overlap else [True] * len(whole)
        for part, path in paths.items():
            pairs = zip(whole, keep, strict=True)
            mine = [one for (its, one), new in pairs if new and its == part]
            if not mine:
                raise ValueError(f"dialogues={given!r} has none in part={part!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lines(mine))
    return {part: path.parent for part, path in paths.items()}


def lines(dialogues: Iterable[list[Message]]) -> str:
    """One dialogue a line, in the layout that `datasets` reads as `messages`."""
    return "".join(json.dumps({"messages": one}) + "\n" for one in dialogues)


def read(given: str, part: Part) -> Iterator[list[Message]]:
    """The dialogues of a part; empty: made ones."""
    if not given:
        yield from made(part)
        return
    for _, one in open_documents(given, part=part, column="messages").read():
        if is_dialogue(one):
            yield [{"role": m["role"], "content": m["content"]} for m in one]


def made(part: Part) -> Iterator[list[Message]]:
    """Questions and answers on functions that have a docstring."""
    for name in corpus.names(part):
        if not name.endswith(".py"):
            continue
        text = corpus.read(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the files do, not of ours
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                yield from about(node, text.splitlines(), name)


def about(node: ast.FunctionDef, text: list[str], file: str) -> Iterator[list[Message]]:
    """A dialogue on one function, if it does anything; which kind decides its name."""
    if len(node.body) < 2:
        return
    summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    said = node.body[0]
    above, below = text[node.lineno - 1 : said.lineno - 1], text[said.end_lineno :]
    below = below[: (node.end_lineno or 0) - (said.end_lineno or 0)]
    code = textwrap.dedent("\n".join(above + below))
    names = ", ".join(a.arg for a in node.args.args) or "none"
    kind = hashlib.blake2b(f"{file} {node.name}".encode(), digest_size=1).digest()[0]
    if kind % 3 == 0:
        turns = [f"What does this function do?\n\n{code}", summary]
    else:
        turns = [f"Write a function {node.name}. {summary}", code]
    if kind % 3 == 1:
        turns += ["What are its arguments?", names]
    yield [
        {"role": ("user", "assistant")[i % 2], "content": turn}
        for i, turn in enumerate(turns)
    ]
