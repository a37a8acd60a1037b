"""Activations on disk: a folder of safetensors files and one manifest.

Each shard holds `{site}` [rows, width] for every site, and the contexts that they came
from: `tokens` [contexts, length], and per row its `context` and `position` in it.
Gradients of the model's loss are further sites, by the names of `gradient_of`. The
files map into memory; a row is read without reading its shard. `manifest.json` says
what made them (model, sites, type, text), and for each shard its rows and checksum.
"""

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sae_jax.whole_files import write_whole

FORMAT = "sae_jax.activations.1"
MANIFEST = "manifest.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
}


class ShardError(ValueError):
    """A shard or manifest that cannot be used, and what to do about it."""


class Entry(NamedTuple):
    """What the manifest says of one shard; `next` is where the text goes on."""

    file: str
    rows: int
    bytes: int
    sha256: str
    next: Any


def identity(made_by: dict[str, Any]) -> str:
    """A short name for what made the shards, kept in each of them."""
    text = json.dumps(made_by, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_shard(
    folder: Path,
    number: int,
    arrays: dict[str, np.ndarray],
    made_by: dict[str, Any],
    next_place: Any,
) -> Entry:
    """Writes one shard whole or not at all."""
    rows = len(arrays["context"])
    path = folder / f"shard-{number:05d}.safetensors"
    unfinished = path.with_suffix(".unfinished")
    try:
        # One entry only: safetensors writes several in an order that changes by chance.
        save_file(arrays, unfinished, {"made_by": identity(made_by)})
        with unfinished.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # how it reports the system's errors
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
        raise
    return Entry(path.name, rows, path.stat().st_size, checksum, next_place)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replaces the manifest whole."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards."""
    path = folder / MANIFEST
    if not path.exists():
        raise ShardError(
            f"{folder} has no {MANIFEST}: it is no folder of harvested activations. "
            f"Make one with: python launch.py --experiment=harvest"
        )
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ShardError(
                f"{path} has format {manifest['format']!r}, this version reads {FORMAT}"
            )
        manifest["shards"] = [Entry(**entry) for entry in manifest["shards"]]
        identity(manifest["made_by"])
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged: {error!r}") from None
    return manifest


class Shards:
    """The rows of all shards of a folder, as one mapped table.

    Opening checks every shard: present, whole, made by the run of this manifest and,
    with `verify`, its checksum (which reads every byte once).
    """

    def __init__(self, folder: str | Path, *, verify: bool = True):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self.made_by = self.manifest["made_by"]
        if not self.manifest["shards"]:
            raise ShardError(f"{self.folder} holds no finished shard yet")
        self._tables = [
            open_shard(self.folder, entry, self.made_by, verify)
            for entry in self.manifest["shards"]
        ]
        counts = [entry.rows for entry in self.manifest["shards"]]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def widths(self) -> dict[str, int]:
        """The width of each site."""
        return self.made_by["sites"]

    def rows(self, index: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Rows by number, of sites or of `context` and `position`."""
        index = np.asarray(index)
        shard = np.searchsorted(self._ends, index, side="right")
        out = {}
        for name in names:
            first = self._tables[0][name]
            out[name] = np.empty((len(index), *first.shape[1:]), first.dtype)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            begin = self._ends[number - 1] if number else 0
            # In the file's order: the disk is read forwards.
            here = here[np.argsort(index[here], kind="stable")]
            for name in names:
                out[name][here] = self._tables[number][name][index[here] - begin]
        return out

    def contexts(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The whole context of each row, and the row's position in it."""
        at = self.rows(index, ("context", "position"))
        shard = np.searchsorted(self._ends, np.asarray(index), side="right")
        tokens = [
            self._tables[s]["tokens"][c]
            for s, c in zip(shard, at["context"], strict=True)
        ]
        return np.stack(tokens), at["position"]


def open_shard(
    folder: Path, entry: Entry, made_by: dict[str, Any], verify: bool
) -> dict[str, np.ndarray]:
    """Maps the arrays of one shard; refuses what is not what the manifest says."""
    path = folder / entry.file
    mend = "Delete it and run the same harvest again: it writes what is missing anew"
    if not path.exists():
        raise ShardError(f"{path} is missing. {mend}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ShardError(f"{path} has {size} bytes instead of {entry.bytes}. {mend}")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tables: dict[str, np.ndarray] = {}
        for name, info in header.items():
            begin, end = info["data_offsets"]
            dtype, shape = DTYPES[info["dtype"]], tuple(info["shape"])
            if end - begin != dtype.itemsize * int(np.prod(shape)) or end > size:
                raise ValueError(f"{name} does not fill its place")
            tables[name] = np.memmap(path, dtype, "r", 8 + length + begin, shape)
        if metadata.get("made_by") != identity(made_by):
            raise ValueError("it was made by another harvest")
        if verify:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    raise ValueError("its checksum is not the manifest's")
        if "tokens" not in tables:
            raise ValueError("tokens is missing")
        for name in (*made_by["sites"], "context", "position"):
            if name not in tables or len(tables[name]) != entry.rows:
                raise ValueError(f"{name} is missing or has not {entry.rows} rows")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is damaged or foreign: {error}. {mend}") from None
    return tables
