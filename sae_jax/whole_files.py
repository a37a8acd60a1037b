"""Files that are there whole or not at all, also after a kill or a power cut."""

import os
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
