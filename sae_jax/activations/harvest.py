"""Harvesting: activations of a text, written to shards, resumable.

A shard is written whole, then the manifest with the place in the text where the next
one begins. Killed at any moment, nothing written is lost, and the same command goes on
where it stopped. Never more than one shard is in memory.
"""

import errno
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sae_jax.activations.harvester import Harvester
from sae_jax.activations.shards import (
    FORMAT,
    MANIFEST,
    ShardError,
    read_manifest,
    write_manifest,
    write_shard,
)
from sae_jax.checks import changed
from sae_jax.text.blocks import Block, Place, blocks
from sae_jax.text.contexts import Packing
from sae_jax.text.documents import Documents


def harvest(
    folder: str | Path,
    harvester: Harvester,
    documents: Documents,
    tokenizer: Any,
    packing: Packing,
    *,
    rows: int,
    rows_per_shard: int,
    text: dict[str, Any],
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> dict[str, Any]:
    """Writes `rows` rows, or all the text has if it ends before; returns the manifest.

    `text` says in plain values what the documents are; a run is resumed only if it, the
    model, the sites and the packing are the same.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {
        **harvester.made_by,
        "text": {**text, "fingerprint": documents.fingerprint()},
        "packing": packing._asdict(),
        "rows_per_shard": rows_per_shard,
    }
    manifest = start(folder, made_by)
    done = sum(entry.rows for entry in manifest["shards"])
    require_space(folder, harvester, rows - done, free(folder))
    place = Place(*manifest["shards"][-1].next) if manifest["shards"] else None
    size = 0
    stream: Iterator[Block] = iter(())
    bar = tqdm(total=rows, initial=done, unit=" rows", unit_scale=True, desc="harvest")
    with bar:
        for number in itertools.count(len(manifest["shards"])):
            wanted = min(rows_per_shard, max(rows - done, 0))
            if size != wanted:
                size = wanted
                stream = blocks(documents, tokenizer, packing, size, place)
            block = next(stream, None) if size else None
            if block is None:
                break
            arrays = as_arrays(harvester, block)
            try:
                entry = write_shard(folder, number, arrays, made_by, block.after)
                manifest["shards"].append(entry)
                save(folder, manifest)
                place = block.after
            except OSError as error:
                raise explained(error, folder, done) from error
            done += entry.rows
            bar.update(entry.rows)
    if not done:
        raise ValueError(f"the text of {text} has no position to harvest")
    if done < rows:
        tqdm.write(f"The text ended after {done} of {rows} rows.")
    return manifest


def start(folder: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """A new manifest, or that of the run to resume; refuses another run's."""
    if not (folder / MANIFEST).exists():
        if any(path.suffix != ".unfinished" for path in folder.iterdir()):
            raise ShardError(
                f"{folder} is not empty and has no {MANIFEST}; harvest into an empty "
                f"folder, so that no shard of another run is mixed in"
            )
        manifest: dict[str, Any] = {"format": FORMAT, "made_by": made_by, "shards": []}
        save(folder, manifest)
        return manifest
    manifest = read_manifest(folder)
    differ = changed(manifest["made_by"], made_by)
    if differ:
        raise ShardError(
            f"{folder} was begun by another harvest: {differ}. "
            f"Choose another folder, or the same settings to resume"
        )
    for number, entry in enumerate(manifest["shards"]):
        path = folder / entry.file
        if not path.exists() or path.stat().st_size != entry.bytes:
            tqdm.write(f"{path} is missing or not whole: harvesting again from there.")
            del manifest["shards"][number:]
            break
    return manifest


def save(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, its entries as plain values."""
    entries = [entry._asdict() for entry in manifest["shards"]]
    write_manifest(folder, {**manifest, "shards": entries})


def as_arrays(harvester: Harvester, block: Block) -> dict[str, np.ndarray]:
    """What a shard holds."""
    values = jax.device_get(harvester.rows(block))
    return {
        **values,
        "tokens": block.tokens.astype(np.int32),
        "context": block.row.astype(np.int32),
        "position": block.column.astype(np.int32),
    }


def require_space(folder: Path, harvester: Harvester, rows: int, free: int) -> None:
    """Refuses to begin what the disk cannot hold."""
    size = np.dtype(jax.numpy.dtype(harvester.dtype)).itemsize
    needed = rows * (size * sum(harvester.widths.values()) + 16)
    if needed > free:
        raise ShardError(
            f"{rows} rows need {needed / 1e9:.2g} GB, {folder} has {free / 1e9:.2g} GB "
            f"free; harvest fewer rows or sites, or choose another disk"
        )


def explained(error: OSError, folder: Path, done: int) -> Exception:
    """A full disk in plain words; any other fault as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return ShardError(
        f"the disk of {folder} is full. {done} rows are safe in finished shards; make "
        f"room and run the same command to go on"
    )
