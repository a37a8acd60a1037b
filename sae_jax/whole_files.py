"""Files that are there whole or not at all, also after a kill or a power cut."""

import os
import shutil
from collections.abc import Callable, Set
from pathlib import Path

UNFINISHED = ".unfinished"


def write_whole(path: Path, text: str) -> None:
    """Replaces the file by one that was finished under another name."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def write_folder(
    folder: str | Path, files: Set[str], fill: Callable[[Path], None]
) -> Path:
    """Makes a folder of these files by `fill`; one of no other files is replaced.

    A kill at the moment of replacing leaves the old one in NAME.replaced.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not _only(folder, files):
        raise ValueError(
            f"{folder} exists and holds something other than an SAE in this format; "
            f"give another folder, or remove it."
        )
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        fill(unfinished)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of a save that was killed
        folder.rename(replaced)
    unfinished.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def _only(folder: Path, files: Set[str]) -> bool:
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= files
