"""The page: results, figures, settings and steered texts, in one file, escaped."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sae_jax.report.browser import Points
from sae_jax.report.page import write_page
from sae_jax.report.table import COLUMNS
from tests.test_report import MEASURED

BAD = "<script>alert('x')</script>\"&"


class Tags(HTMLParser):
    """Collects tags with their attributes, and the text of each kind of tag."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def page(path, **changes):
    figure = path.with_name("figure.png")
    figure.write_bytes(b"\x89PNG of a kind")
    given = {
        "title": "A run",
        "summary": "First.\n\nSecond.",
        "rows": [MEASURED],
        "figures": [(figure, "What it shows")],
        "config": {"steps": 3, "rules": ["a", "b"]},
        "about": {"jax": "0.10.2"},
    }
    write_page(path, **{**given, **changes})
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    assert tags.open == []
    return tags


def everything():
    """What a page may have beside its results; the browser has tests of its own."""
    norms = np.arange(1.0, 7)
    points = Points(norms, norms, np.arange(6).reshape(2, 3), list("abcdef"))
    return {"zf": {"mine": points}, "steered": {"mine": {7: [("plain", "so it goes")]}}}


def test_a_page_has_results_figures_and_settings(tmp_path):
    found = page(tmp_path / "report.html")
    assert found.text["h1"] == found.text["title"] == ["A run"]
    assert found.text["p"] == ["First.", "Second."]
    shown = [column.show(MEASURED) for column in COLUMNS]
    assert found.text["td"] == [*shown, "3", '["a", "b"]', "0.10.2"]
    assert len(found.text["dt"]) == len(found.text["dd"]) == len(shown)
    assert found.text["figcaption"] == ["What it shows"]
    (image,) = (attrs for tag, attrs in found.tags if tag == "img")
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == b"\x89PNG of a kind"
    assert sum(tag == "details" for tag, _ in found.tags) == 2


def test_sections_are_there_only_if_there_is_something_in_them(tmp_path):
    found = page(tmp_path / "report.html")
    assert found.text["h2"] == ["Results", "Figures", "How it was made"]
    found = page(tmp_path / "report.html", **everything())
    assert found.text["h2"] == [
        *("Results", "ZF plot", "Figures", "Steered generation", "How it was made")
    ]


def test_steered_texts_are_read_without_a_script(tmp_path):
    samples = [("prompt", "def"), ("plain", "def f():\n  pass")]
    found = page(tmp_path / "report.html", steered={"mine": {7: samples, 9: samples}})
    assert found.text["h3"] == ["mine, feature 7", "mine, feature 9"]
    texts = [text for sample in samples for text in sample]
    assert found.text["p"][2:] == [*texts, *texts]


def test_a_page_needs_nothing_but_itself(tmp_path):
    found = page(tmp_path / "report.html", **everything())
    assert not {"link", "iframe", "object"} & {tag for tag, _ in found.tags}
    for tag, attrs in found.tags:
        for name in ("src", "href", "srcset"):
            assert re.match("data:|#", attrs.get(name, "data:")), (tag, attrs)
    text = (tmp_path / "report.html").read_text()
    # The name of SVG's namespace, which nothing fetches.
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )
    assert not re.search(r"url\(|@import", text)
    assert "color-scheme: light dark" in text  # the browser's colours follow the reader


def test_what_comes_from_data_is_escaped_everywhere(tmp_path):
    path = tmp_path / "report.html"
    expected = [tag for tag, _ in page(path, **everything()).tags]
    norms = np.ones(1)
    found = page(
        path,
        title=BAD,
        summary=f"{BAD}\n\n{BAD}",
        rows=[{**MEASURED, "name": BAD}],
        figures=[(tmp_path / "figure.png", BAD)],
        config={BAD: BAD, 2: 3},
        about={BAD: {BAD: BAD}},
        zf={BAD: Points(norms, norms, np.zeros((1, 1), int), [BAD])},
        steered={BAD: {7: [(BAD, BAD)]}},
    )
    assert [tag for tag, _ in found.tags] == expected  # no tag came from data
    assert "<script>alert" not in path.read_text()
    for tag in ("title", "h1", "figcaption"):
        assert found.text[tag] == [BAD]
    assert found.text["p"].count(BAD) == 4
    assert found.text["h3"] == [f"{BAD}, feature 7"]
    assert found.text["th"].count(BAD) == 3
    assert [attrs["alt"] for tag, attrs in found.tags if tag == "img"] == [BAD]


def test_a_page_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    page(path)
    before = path.read_text()
    with pytest.raises(FileNotFoundError):
        page(path, figures=[(tmp_path / "absent.png", "")], title="Another")
    with pytest.raises(UnicodeEncodeError):  # half way through writing
        page(path, title="\ud800")
    assert path.read_text() == before
    page(path, title="Another")
    assert "Another" in path.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.png", "report.html"]


def test_notes_stand_in_columns_and_without_rows_there_is_no_table(tmp_path):
    table = f"layer  median\n    1     0.5 {BAD}"
    tags = page(tmp_path / "a.html", notes={"Medians": table}, rows=[])
    assert tags.text["pre"] == [table]
    assert "Medians" in tags.text["h2"]
    assert "Results" not in tags.text["h2"]
    tags = page(tmp_path / "b.html")
    assert "Results" in tags.text["h2"]
    assert "pre" not in tags.text
