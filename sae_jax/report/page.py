"""The page: what a run found, how it was made, and its features, in one HTML file.

The file needs nothing but itself: figures, data and script are embedded, and nothing is
fetched. What comes from data is escaped. Without its script the page still has results,
figures, steered texts and settings.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae_jax.report.browser import Browser, Points, Steered, packed
from sae_jax.report.scores import Row
from sae_jax.report.table import COLUMNS
from sae_jax.whole_files import write_whole

ASSETS = Path(__file__).with_name("assets")
STYLE, ZF, BROWSER, *SCRIPTS = (
    (ASSETS / name).read_text(encoding="utf-8").strip()
    for name in "page.css zf.html browser.html page.js plots.js browser.js".split()
)
SCRIPT = "\n".join(SCRIPTS)
# Nothing may be fetched, and no script run but the page's own.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
    f"'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
NONE: Mapping[str, Any] = {}
SAFE = "!'()*"  # what JavaScript's encodeURIComponent leaves as well


def write_page(
    path: Path,
    *,
    title: str,
    summary: str,
    rows: Sequence[Row],
    figures: Sequence[tuple[Path, str]],
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    zf: Mapping[str, Points] = NONE,
    browsers: Mapping[str, Browser] = NONE,
    steered: Steered = NONE,
    notes: Mapping[str, str] = NONE,
) -> None:
    """Writes the page whole or not at all.

    Args:
        path: The HTML file.
        title: What the run was.
        summary: What it found; an empty line begins a paragraph.
        rows: One per SAE, as `table` takes them; without any there is no table.
        figures: PNG files and their captions, in order.
        config: The settings of the run.
        about: Versions, machine, and whatever else made the results.
        zf: Panels of the interactive ZF plot, by name.
        browsers: Features to browse, by name of the SAE.
        steered: Texts by name of the SAE and feature, each with a label, such as
            ("prompt", ...), ("plain", ...), ("steered by 4", ...).
        notes: Texts in columns, such as tables, by their headings.
    """
    paragraphs = [f"<p>{escape(text)}</p>" for text in summary.split("\n\n")]
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head>",
        f"<body><h1>{escape(title)}</h1>",
        *paragraphs,
        _results(rows) if rows else "",
        *(
            f'<h2>{escape(heading)}</h2>\n<pre class="wide">{escape(text)}</pre>'
            for heading, text in notes.items()
        ),
        ZF if zf else "",
        "<h2>Figures</h2>",
        *(_figure(file, caption) for file, caption in figures),
        BROWSER if browsers else "",
        *_steered(steered, browsers),
        "<h2>How it was made</h2>",
        _record("Settings", config),
        _record("Versions and machine", about),
        *packed(browsers, zf),
        f"<script>{SCRIPT}</script>",
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
        '<h2>Results</h2>\n<div class="wide"><table class="results">\n'
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


def _steered(steered: Steered, browsers: Mapping[str, Browser]) -> Iterator[str]:
    """The texts; a feature that can be browsed is a link to it."""
    if steered:
        yield "<h2>Steered generation</h2>"
    for name, features in steered.items():
        for feature, samples in features.items():
            heading = escape(f"{name}, feature {feature}")
            if name in browsers:
                link = f"#{quote(name, safe=SAFE)}/feature/{feature}"
                heading = f'<a href="{escape(link)}">{heading}</a>'
            texts = "\n".join(
                f'<p class="label">{escape(label)}</p>'
                f'<p class="steered">{escape(text)}</p>'
                for label, text in samples
            )
            yield (
                f'<div class="sample" data-sae="{escape(name)}" '
                f'data-feature="{feature}"><h3>{heading}</h3>\n{texts}</div>'
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
