"""The embedded corpus: the sources and help texts that every Python carries.

About ten megabytes of real text that need no download. Which part a document belongs
to follows from a hash of its path below the standard library, so that a file keeps its
side on another machine and in another Python version.
"""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PARTS = ("train", "validation", "heldout")
SUFFIXES = (".py", ".txt", ".rst", ".md")
# Not the standard library's own words: tests, installed packages, tables of bytes,
# and what was generated for one machine.
LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    "encodings", "_vendor", "_bundled",
}  # fmt: skip
LEFT_OUT_STARTS = ("_sysconfigdata", "config-", "plat-")
TOPICS = "pydoc_data/topics.py"


def part_of(name: str) -> str:
    """85 % of the names are for training, 5 % for validation, 10 % are held out."""
    digest = hashlib.blake2b(
        name.encode("utf-8", "surrogateescape"), digest_size=8
    ).digest()
    bucket = int.from_bytes(digest, "big") % 20
    return "validation" if bucket == 0 else "heldout" if bucket <= 2 else "train"


def names(part: str, root: Path | None = None) -> list[str]:
    """The names of one part's documents, sorted.

    A name is a path below the standard library; a help topic adds `#topic`.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r} is none of {', '.join(PARTS)}")
    root = root or library()
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(wanted, subfolders)
        found += [
            Path(folder, file).relative_to(root).as_posix()
            for file in files
            if file.endswith(SUFFIXES) and wanted(file)
        ]
    if TOPICS in found:
        found.remove(TOPICS)
        found += [f"{TOPICS}#{topic}" for topic in topics(root)]
    return sorted(name for name in found if part_of(name) == part)


def wanted(name: str) -> bool:
    """Whether a file or folder of this name is part of the corpus."""
    return name not in LEFT_OUT and not name.startswith(LEFT_OUT_STARTS)


def read(name: str, root: Path | None = None) -> str:
    """The text of one document; empty for the few that are not UTF-8."""
    root = root or library()
    file, _, topic = name.partition("#")
    if topic:
        return topics(root)[topic]
    try:
        return (root / file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def documents(part: str, root: Path | None = None) -> Iterator[str]:
    """All documents of one part, in the order of their names."""
    root = root or library()
    return (read(name, root) for name in names(part, root))


def library() -> Path:
    """Where this interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


_topics: dict[Path, dict[str, str]] = {}


def topics(root: Path) -> dict[str, str]:
    """What `help()` says on Python's own topics: a literal, so nothing is executed."""
    if root not in _topics:
        tree = ast.parse((root / TOPICS).read_text(encoding="utf-8"))
        literal = next(n.value for n in tree.body if isinstance(n, ast.Assign))
        _topics[root] = ast.literal_eval(literal)
    return _topics[root]
