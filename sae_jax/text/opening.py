"""From the name of a dataset to its documents; every fault is found here, at once.

`dataset` names one of three kinds: 'embedded' (the interpreter's own files), local
files and folders (.txt, .md, .rst, .py: one file is one document; .jsonl, .parquet: one
row is one; hidden files are left out), or a Hugging Face dataset by id, streamed.
"""

import copy
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

from sae_jax.text import corpus
from sae_jax.text.dialogues import is_dialogue
from sae_jax.text.documents import Documents, Files, Part, Rows, examples

EMBEDDED = "embedded"
ROW_FILES = {".jsonl": "json", ".parquet": "parquet"}


def open_documents(
    dataset: str = EMBEDDED,
    *,
    part: Part = "train",
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    seed: int = 0,
) -> Documents:
    """The documents of one part of a dataset; every fault is found here, at once.

    `column` (of text, dialogues or token ids), `split` and `subset` are Hugging Face's
    and apply to rows only. For datasets with a held-out split of their own, use
    `part='all'`.
    """
    if part not in (*corpus.PARTS, "all"):
        raise ValueError(f"part={part!r} is none of {', '.join(corpus.PARTS)}, all")
    if not dataset:
        raise ValueError("dataset='' names no text")
    if dataset == EMBEDDED:
        names = [n for p in corpus.PARTS if part in ("all", p) for n in corpus.names(p)]
        return Files(names, corpus.read, seed)
    path = Path(dataset).expanduser()
    if path.exists():
        if subset:
            raise ValueError(f"subset={subset!r}: local files have none")
        return local(path, part=part, column=column, split=split, seed=seed)
    if dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise FileNotFoundError(f"dataset={dataset!r} is not on this machine")
    return rows(from_hub(dataset, split, subset), column, part, dataset)


def local(path: Path, *, part: Part, column: str, split: str, seed: int) -> Documents:
    """Documents of a file or folder."""
    root = path.parent if path.is_file() else path
    found = [
        p
        for p in ([path] if path.is_file() else sorted(path.rglob("*")))
        if p.is_file() and not re.search(r"(^|/)\.", p.relative_to(root).as_posix())
    ]
    tables = [p for p in found if p.suffix in ROW_FILES]
    texts = {
        p.relative_to(root).as_posix(): p for p in found if p.suffix in corpus.SUFFIXES
    }
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return rows(from_disk(path, split), column, part, str(path))
    if tables and texts:
        # Cards and licences beside tables are no documents; text beside them may be.
        texts = {n: p for n, p in texts.items() if p.suffix not in (".md", ".txt")}
    if bool(tables) == bool(texts) or len({p.suffix for p in tables}) > 1:
        raise ValueError(
            f"dataset={str(path)!r} needs files of one kind: text "
            f"({', '.join(corpus.SUFFIXES)}), or tables of one suffix "
            f"({', '.join(ROW_FILES)}); it has {len(texts)} and {len(tables)}"
        )
    if tables:
        import datasets

        kind = ROW_FILES[tables[0].suffix]
        tables = of_split(tables, split, path)
        files = [str(p) for p in tables if p.stat().st_size]
        if not files:
            raise ValueError(f"dataset={str(path)!r} has no rows: its files are empty")
        stream = datasets.load_dataset(
            kind, data_files=files, split="train", streaming=True
        )
        return rows(stream, column, part, str(path))
    names = sorted(n for n in texts if part in ("all", corpus.part_of(n)))
    if not names:
        raise ValueError(
            f"none of the {len(texts)} files in dataset={str(path)!r} falls into "
            f"part={part!r}, which a hash of their names decides; use part='all'"
        )
    return Files(names, lambda name: read_file(texts[name]), seed)


def read_file(path: Path) -> str:
    """The text of a file; of one that is not UTF-8 nothing, with a warning."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        warnings.warn(f"{path} is not UTF-8 and left out", stacklevel=2)
        return ""


def of_split(tables: list[Path], split: str, path: Path) -> list[Path]:
    """The files of a split, where their names say so, as Hugging Face names them."""
    by_split: dict[str, list[Path]] = {}
    for table in tables:
        word = re.search(
            r"(?<![a-z])(train|test|validation|valid|dev)(?![a-z])", table.stem
        )
        by_split.setdefault(word[1] if word else "", []).append(table)
    if set(by_split) == {""}:
        by_split = {"train": tables}
    if split not in by_split:
        raise ValueError(
            f"split={split!r} of dataset={str(path)!r} is none of "
            f"{', '.join(by_split)}, which the names of its files say"
        )
    return by_split[split]


def from_disk(path: Path, split: str) -> Any:
    """A dataset that `save_to_disk` wrote."""
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"split={split!r} of {path} is none of {', '.join(data)}")
        data = data[split]
    return data.with_format(None).to_iterable_dataset()


def from_hub(name: str, split: str, subset: str | None) -> Any:
    """A stream from the Hugging Face hub, or at once the reason why there is none.

    Where a dataset is still a loading script, which `datasets` no longer runs, the
    hub's own conversion of it to parquet is taken.
    """
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
        try:
            return datasets.load_dataset(name, subset, split=split, streaming=True)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            return datasets.load_dataset(
                name,
                data_dir=subset,  # where the converted branch keeps its subsets
                split=split,
                streaming=True,
                revision="refs/convert/parquet",
            )
    except (OSError, ValueError, RuntimeError) as error:  # OSErrors: the network's
        # Both builtin and requests' own: a name, for requests is no dependency of ours.
        offline = type(error).__name__ == "ConnectionError"
        reason = "it cannot be reached" if offline else " ".join(str(error).split())
        raise FileNotFoundError(
            f"dataset={name!r} (split={split!r}, subset={subset!r}) is nothing on this "
            f"machine and could not be opened on the Hugging Face hub: {reason[:300]}. "
            f"Give a local folder or file, or {EMBEDDED!r}, which needs no network"
        ) from None


def rows(stream: Any, column: str, part: Part, name: str) -> Rows:
    """Rows of a stream whose column holds text, dialogues or token ids."""
    head = list(itertools.islice(examples(copy.deepcopy(stream), name, 0), 100))
    if not head:
        raise ValueError(f"dataset={name!r} has no rows")
    first = next((row for row in head if row.get(column) is not None), head[0])
    if column not in first:
        raise ValueError(
            f"dataset={name!r} has no column {column!r}; it has {', '.join(first)}"
        )
    value = first[column]
    ids = isinstance(value, list) and all(isinstance(v, int) for v in value)
    if not isinstance(value, str) and not ids and not is_dialogue(value):
        raise ValueError(
            f"column={column!r} of dataset={name!r} holds {type(value).__name__}, "
            f"not text or token ids, nor messages with role and content"
        )
    return Rows(name, stream, column, part)
