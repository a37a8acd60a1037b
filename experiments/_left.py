"""What an analysis leaves: its text, what it found as JSON, and a page of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_jax import report
from sae_jax.run.folder import environment
from sae_jax.settings import to_dict
from sae_jax.whole_files import write_whole


def leave_found(name: str, config: Any, text: str, record: Mapping[str, Any]) -> None:
    """`name.txt`, which is printed as well, and `name.json` with the settings."""
    out = Path(config.out).expanduser()
    held = {**record, "settings": to_dict(config)}
    write_whole(out / f"{name}.txt", f"{text}\n")
    write_whole(out / f"{name}.json", json.dumps(held, indent=1) + "\n")
    print(f"\n{text}\n", flush=True)


def leave_page(
    config: Any,
    *,
    title: str,
    notes: Mapping[str, str],
    figures: Sequence[tuple[Path, str]],
    summary: str = "",
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """`report.html`, and where it is."""
    path = Path(config.out).expanduser() / "report.html"
    report.write_page(
        path,
        title=title,
        summary=summary or f"Language model: {config.lm}. Text: {config.dataset}.",
        rows=rows,
        figures=figures,
        notes=notes,
        config=to_dict(config),
        about=environment(),
    )
    print(f"Report: {path.resolve()}")
