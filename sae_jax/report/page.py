"""The page: results, figures, settings and versions of a run in one HTML file.

The file needs nothing but itself: figures are embedded, there is no script, and nothing
is fetched. What comes from data is escaped.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sae_jax.report.table import COLUMNS, Row
from sae_jax.whole_files import write_whole

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 58rem; margin: auto;
  padding: 1rem; }
h1 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; break-after: avoid; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line);
  vertical-align: top; text-align: left; }
.results { width: 100%; font-variant-numeric: tabular-nums; }
.results th + th, td { text-align: right; white-space: nowrap; }
.results tbody tr:nth-child(odd) { background: var(--faint); }
.results tbody th { font-weight: normal; min-width: 9rem; overflow-wrap: anywhere; }
small { font-weight: normal; opacity: 0.75; }
.record td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { font-size: 0.875rem; display: grid; grid-template-columns: max-content 1fr;
  gap: 0.2rem 1rem; }
dt { font-weight: bold; }
dd { margin: 0; }
figure { margin: 2rem 0; break-inside: avoid; }
img { display: block; width: 100%; min-width: 36rem; max-width: 58rem;
  background: white; border-radius: 6px; }
figcaption { font-size: 0.875rem; margin-top: 0.5rem; }
summary { cursor: pointer; font-weight: bold; margin: 1rem 0; }
@media print { body { max-width: none; } .wide { overflow: visible; }
  details::details-content { content-visibility: visible; } }
"""


def write_page(
    path: Path,
    *,
    title: str,
    summary: str,
    rows: Sequence[Row],
    figures: Sequence[tuple[Path, str]],
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Writes the page whole or not at all.

    Args:
        path: The HTML file.
        title: What the run was.
        summary: What it found; an empty line begins a paragraph.
        rows: One per trained SAE, as `table` takes them.
        figures: PNG files and their captions, in order.
        config: The settings of the run.
        about: Versions, machine, and whatever else made the results.
    """
    paragraphs = [f"<p>{escape(text)}</p>" for text in summary.split("\n\n")]
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head>",
        f"<body><h1>{escape(title)}</h1>",
        *paragraphs,
        "<h2>Results</h2>",
        _results(rows),
        "<h2>Figures</h2>",
        *(_figure(file, caption) for file, caption in figures),
        "<h2>How it was made</h2>",
        _record("Settings", config),
        _record("Versions and machine", about),
        "</body></html>",
    ]
    write_whole(path, "\n".join(parts))


def _results(rows: Sequence[Row]) -> str:
    head = "".join(
        f'<th scope="col">{escape(column.heading)}<br><small>{escape(column.unit)}'
        "</small></th>"
        for column in COLUMNS
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(str(row["name"]))}</th>'
        + "".join(f"<td>{escape(column.show(row))}</td>" for column in COLUMNS)
        + "</tr>"
        for row in rows
    )
    meanings = "\n".join(
        f"<dt>{escape(column.heading)}</dt><dd>{escape(column.meaning)}</dd>"
        for column in COLUMNS
    )
    return (
        '<div class="wide"><table class="results">\n'
        f'<thead><tr><th scope="col">name</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>\n<dl>\n{meanings}\n</dl>"
    )


def _figure(file: Path, caption: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><div class="wide"><img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _record(heading: str, values: Mapping[str, Any]) -> str:
    """Names and values behind a line that opens them."""
    lines = "\n".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_text(value))}</td>'
        "</tr>"
        for name, value in values.items()
    )
    return (
        f"<details><summary>{escape(heading)}</summary>\n"
        f'<div class="wide"><table class="record">\n{lines}\n</table></div></details>'
    )


def _text(value: Any) -> str:
    """A setting as a reader would write it; nested ones as JSON."""
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
