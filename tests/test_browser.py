"""The feature browser: what is packed, and what a reader sees and can do."""

import base64
import dataclasses
import json
import re
import zlib

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from sae_jax.analysis.interpretation.labels import Labels
from sae_jax.evaluation.catalogue import GROUPS, Catalogue
from sae_jax.evaluation.firings import Firings
from sae_jax.report.browser import Browser, Points, packed
from sae_jax.report.browser_chunks import Texts, token_texts
from sae_jax.report.page import write_page
from tests.chromium import PROGRAM, Chromium

HOSTILE = "</script><img src=x onerror=alert(1)>"
WORDS = [" the", "def", "↵", " =", "(", "self", "é", HOSTILE, "    ", "return"]
N_EXAMPLES = sum(n for _, n in GROUPS)


def vocabulary(n):
    return [*WORDS, *(f" w{i}" for i in range(len(WORDS), n))]


def fake(
    n_features=40,
    n_contexts=6,
    width=32,
    per_feature=12,
    n_words=50,
    seed=0,
    texts=None,
):
    """A random catalogue; feature 3 is dead, feature 5 fires on every third row."""
    rng = np.random.default_rng(seed)
    n_rows = n_contexts * width
    rows = rng.integers(n_rows, size=n_features * per_feature)
    keys = np.repeat(np.arange(n_features), per_feature) * n_rows + rows
    keys = np.union1d(keys[keys // n_rows != 3], 5 * n_rows + np.arange(0, n_rows, 3))
    owner, rows = keys // n_rows, (keys % n_rows).astype(np.int32)
    values = rng.gamma(2, 1, len(keys)).astype(np.float32)
    starts = np.searchsorted(owner, np.arange(n_features + 1))
    counts = np.diff(starts)
    highest = np.zeros(n_features, np.float32)
    np.maximum.at(highest, owner, values)
    bins = np.minimum(20 * values / highest[owner], 19).astype(int)
    order = np.lexsort((-values, owner))
    place = np.arange(len(keys)) - np.repeat(starts[:-1], counts)
    examples = np.full((n_features, N_EXAMPLES), -1, np.int32)
    shown = place < N_EXAMPLES
    examples[owner[shown], place[shown]] = rows[order][shown]
    norms = rng.uniform(5, 20, (2, n_rows)).astype(np.float32)
    norms[:, ::width] = np.nan
    ids = rng.integers(n_words, size=(2, n_features, 8)).astype(np.int32)
    by = np.sort(rng.gamma(2, 1, (2, n_features, 8)).astype(np.float32))[..., ::-1]
    dead = counts == 0
    firings = Firings(
        rng.integers(n_words, size=(n_contexts, width)),
        np.isfinite(norms[0]).reshape(n_contexts, width),
        n_features,
        starts,
        rows,
        values,
        norms[0],
        norms[1],
    )
    strength = np.bincount(owner, values, n_features) / np.maximum(counts, 1)
    catalogue = Catalogue(
        firings,
        density=counts / n_rows,
        strength=strength,
        highest=highest,
        norm_ratio=np.where(dead, np.nan, rng.uniform(0.6, 1.4, n_features)),
        histogram=np.bincount(20 * owner + bins, minlength=20 * n_features).reshape(
            n_features, 20
        ),
        examples=examples,
        groups=GROUPS,
        nearest=rng.integers(n_features, size=(n_features, 5)).astype(np.int32),
        nearest_cosine=rng.uniform(0, 1, (n_features, 5)).astype(np.float32),
        raised=ids[0],
        raised_by=by[0],
        lowered=ids[1],
        lowered_by=-by[1],
    )
    return Browser(catalogue, texts or vocabulary(n_words))


def unpacked(chunks):
    """The arrays of all chunks, and the page's table of contents."""
    found = {}
    for element in chunks:
        kind, attributes, data = re.fullmatch(
            r'<script type="application/(\S+)" (.*?)>(.*)</script>', element, re.S
        ).groups()
        if kind == "json":
            found["about"] = json.loads(data)
            continue
        name = re.search(r'id="([^"]*)"', attributes)[1]
        layout = re.search(r'data-layout="([^"]*)"', attributes)[1]
        raw, arrays = zlib.decompress(base64.b64decode(data)), {}
        for key, dtype, n in json.loads(layout.replace("&quot;", '"')):
            size = n * np.dtype(dtype).itemsize
            arrays[key] = np.frombuffer(raw[:size], dtype)
            raw = raw[size:]
        assert raw == b""
        found[name] = arrays
    found["texts"] = json.loads(bytes(found["texts"]["json"]))
    return found


# What is packed.


def test_every_feature_comes_back_as_it_was(monkeypatch):
    """Unpacked with loops, in chunks of 16 features, the last of them not full."""
    monkeypatch.setattr("sae_jax.report.browser.FEATURES", 16)
    browser = fake()
    c, words = browser.catalogue, browser.token_texts
    found = unpacked(packed({"mine": browser}, {}))
    tokens, texts = c.firings.tokens.reshape(-1), found["texts"]
    assert [texts[p] for p in found["contexts0"]["tokens"]] == [
        words[t] for t in tokens
    ]
    assert list(found["contexts0"]["width"]) == [32]
    for name in ("density", "strength", "highest", "norm_ratio"):
        np.testing.assert_array_equal(
            found["columns0"][name], np.float32(getattr(c, name))
        )
    firing = {}
    for j in range(40):
        part, i = found[f"details0-{j // 16}"], j % 16
        n = min(16, 40 - j // 16 * 16)
        rows, values = c.firings.of(j)
        for name in ("histogram", "nearest", "nearest_cosine", "raised_by"):
            given = part[name].reshape(n, -1)[i]
            np.testing.assert_array_equal(given, getattr(c, name)[j])
        for name in ("raised", "lowered"):
            given = [texts[p] for p in part[name].reshape(n, -1)[i]]
            assert given == [words[t] for t in getattr(c, name)[j]]
        for k, row in enumerate(part["examples"].reshape(n, -1)[i]):
            assert row == c.examples[j, k]
            at = firing.get(j // 16, 0)
            count = int(part["counts"].reshape(n, -1)[i, k])
            firing[j // 16] = at + count
            places = part["positions"][at : at + count].tolist()
            levels = part["levels"][at : at + count]
            inside = (row >= 0) & (rows // 32 == row // 32)
            assert places == (rows[inside] % 32).tolist()
            # Half a level, and the lowest of all is never 0.
            given = levels / 255 * c.highest[j]
            tolerance = c.highest[j] / 255
            np.testing.assert_allclose(given, values[inside], rtol=0, atol=tolerance)
            assert (levels > 0).all()
    assert [part["positions"].size for part in chunks_of_details(found)] == [
        *firing.values()
    ]


def chunks_of_details(found):
    return [found[name] for name in sorted(found) if name.startswith("details0-")]


def test_searched_texts_are_those_of_the_strongest_examples_and_raised_tokens():
    browser = fake()
    found = unpacked(packed({"mine": browser}, {}))
    tokens = browser.catalogue.firings.tokens.reshape(-1)
    strongest = found["columns0"]["strongest"].reshape(40, 8)
    for j, rows in enumerate(browser.catalogue.examples[:, :8]):
        expected = ["" if r < 0 else browser.token_texts[tokens[r]] for r in rows]
        assert [found["texts"][p] for p in strongest[j]] == expected
    assert not strongest[3].any()  # dead


def test_a_context_is_stored_once_for_all_that_show_it():
    one, other = fake(), fake(seed=1)
    same = Browser(one.catalogue, list(one.token_texts))
    firings = one.catalogue.firings
    points = Points(firings.norm_z, firings.norm_f, firings.tokens, one.token_texts)
    found = unpacked(packed({"a": one, "b": same, "c": other}, {"a": points}))
    assert [b["contexts"] for b in found["about"]["browsers"]] == [0, 0, 1]
    assert found["about"]["zf"][0]["contexts"] == 0
    assert len(found["texts"]) == len({*found["texts"]})


def test_without_logits_nothing_is_raised():
    browser = fake()
    nothing = dict.fromkeys(("raised", "raised_by", "lowered", "lowered_by"))
    bare = Browser(browser.catalogue._replace(**nothing), browser.token_texts)
    found = unpacked(packed({"mine": bare}, {}))
    assert found["columns0"]["raised"].size == 0
    assert not {*nothing} & {*found["details0-0"]}


def test_points_are_the_rows_that_count_and_the_longest_lie_outside():
    z = np.array([1.0, 2, np.nan, 2.5, *np.full(400, 3), 900])
    found = unpacked(packed({}, {"layer 2": Points(z, z / 2)}))
    (panel,) = found["about"]["zf"]
    assert panel["name"] == "layer 2"
    assert (panel["n_rows"], panel["n_outside"]) == (404, 1)
    assert panel["contexts"] is None
    points = found["points0"]
    assert points["norm_z"].tolist() == sorted(z[np.isfinite(z)])[:-1]
    np.testing.assert_array_equal(points["norm_f"], points["norm_z"] / 2)
    np.testing.assert_array_equal(np.float32(z)[points["row"]], points["norm_z"])


def test_points_are_drawn_by_lot_from_all_rows():
    z = np.linspace(1, 2, 9000)
    points = unpacked(packed({}, {"a": Points(z, z)}))["points0"]
    assert len({*points["row"]}) == len(points["row"]) == 1500
    edges = np.array([-1, *points["row"], 9000])
    assert np.diff(edges).max() < 100


def test_parts_that_do_not_fit_are_refused_together():
    browser = fake()
    wrong = Browser(browser.catalogue._replace(groups=(("all", 3),)), ["a"])
    points = Points(np.ones(3), np.ones(3), np.zeros((2, 2), int), ["a"])
    with pytest.raises(ValueError, match="the groups name 3 examples") as error:
        [*packed({"mine": wrong}, {"panel": points})]
    assert "zf['panel']: 4 tokens and 3 norms" in str(error.value)


class Vocabulary:
    def __init__(self, pieces):
        self.pieces = pieces

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, numbers):
        return [self.pieces[i] for i in numbers]


def test_tokens_are_readable():
    pieces = ["Ġthe", "Ċ", "ĉx", "Ã©", "Ã", "<|endoftext|>", None, "日", "▁", "<0x0A>"]
    shown = [
        " the",
        "↵",
        "⇥x",
        "é",
        "\\xc3",
        "<|endoftext|>",
        "[6]",
        "日",
        " ",
        "<0x0A>",
    ]
    letters = ByteLevel.alphabet()
    assert token_texts(Vocabulary([*pieces, *letters]))[:10] == shown
    # Every letter and sign of two bytes, and some of more, as the tokenizer writes it.
    signs = [chr(i) for i in (*range(33, 127), *range(160, 0x800), 0x20AC, 0x1F600)]
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [byte_level.pre_tokenize_str(sign)[0][0] for sign in signs]
    assert token_texts(Vocabulary([*pieces, *letters]))[: len(signs)] == signs
    pieces = ["▁the", "<0x0A>", "<0xE2>", "Ġ", "é"]
    assert token_texts(Vocabulary(pieces)) == [" the", "↵", "\\xe2", "Ġ", "é"]


def test_tokens_beyond_the_tokenizer_are_shown_by_number():
    texts = Texts()
    places = texts.places(np.array([[0, -1], [2, 0]]), ["a"])
    np.testing.assert_array_equal(places, [[1, 0], [2, 1]])
    assert unpacked(texts.chunks())["texts"] == ["", "a", "[2]"]


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ({"n_features": 2000, "n_contexts": 512, "per_feature": 400}, 5),
        ({"n_features": 25_000, "n_contexts": 512, "per_feature": 60}, 25),
    ],
)
def test_pages_stay_small(tmp_path, sizes, most):
    """In MB, for random text, which compresses worse than what people write."""
    browser = fake(width=128, n_words=4000, **sizes)
    assert sum(map(len, packed({"mine": browser}, {}))) < most * 1e6


# What a reader sees and can do, in a browser without network.


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no chromium or google-chrome: the page's script is not tested")
    with Chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab
        assert tab.complaints == []


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page with two SAEs, two panels, and steered texts."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    firings = FIRST.catalogue.firings
    norms = firings.norm_z, firings.norm_f
    write_page(
        path,
        title="A run",
        summary="",
        rows=[{"name": n, "l0": l0} for n, l0 in (("b", 9), ("a", 100), ("c", None))],
        figures=[],
        config={},
        about={},
        zf={
            "layer 1": Points(*norms, firings.tokens, FIRST.token_texts),
            HOSTILE: Points(*norms),
        },
        browsers={"mine k=3/4": FIRST, HOSTILE: SECOND},
        steered={"mine k=3/4": {7: [("steered by 4", HOSTILE)]}},
    )
    return path


def labelled(browser):
    """With a label for each feature but the dead one, and scores of the labels."""
    texts = ["" if j == 3 else f"on {HOSTILE} or {j % 7}" for j in range(40)]
    scores = np.random.default_rng(2).uniform(size=(5, 40))
    scores[:, 3] = np.nan
    return dataclasses.replace(browser, labels=Labels(texts, *scores))


FIRST, SECOND = fake(), labelled(fake(seed=1))
LISTED = "[...document.querySelectorAll('#features [id^=place]')].map(r => r.cells[0]"
LISTED += ".textContent)"
TITLE = "document.querySelector('#detail h3')?.textContent"
FOCUS = "document.activeElement.id"


def features(tab):
    """The numbers of the features in the list, as far as they are in view."""
    return [int(text) for text in tab.run(LISTED)]


def type_in(tab, text):
    """Looks for a text, by keyboard."""
    tab.run("at('search').value = ''")
    tab.run("at('search').focus()")
    for letter in text:
        tab.press(letter)


def choose(tab, name, value):
    """Chooses an option as a reader would."""
    tab.run(f"at('{name}').value = '{value}'")
    tab.run(f"at('{name}').dispatchEvent(new Event('change'))")


def test_a_page_asks_for_nothing_but_its_file(tab, path):
    tab.open(path)
    assert tab.requests == [path.as_uri()]
    assert tab.complaints == []


def test_results_sort_by_mouse_and_keyboard(tab, path):
    tab.open(path)
    names = (
        "[...document.querySelectorAll('.results tbody th')].map(e => e.textContent)"
    )
    sort = "document.querySelectorAll('.results th')[1].ariaSort"
    assert tab.run(names) == ["b", "a", "c"]
    tab.run("document.querySelectorAll('.results th button')[1].click()")
    assert (tab.run(names), tab.run(sort)) == (["b", "a", "c"], "ascending")
    tab.run("document.querySelectorAll('.results th button')[1].focus()")
    tab.press("Enter")
    # By number, not by letter; what was not measured stays last.
    assert (tab.run(names), tab.run(sort)) == (["a", "b", "c"], "descending")
    tab.run("document.querySelectorAll('.results th button')[0].click()")
    assert tab.run(names) == ["a", "b", "c"]
    assert tab.run(sort) is None


def test_a_point_shows_its_norms_and_its_text(tab, path):
    tab.open(path)
    assert tab.run("document.querySelectorAll('#zf-panels svg').length") == 2
    z, f = FIRST.catalogue.firings.norm_z, FIRST.catalogue.firings.norm_f
    first = np.nanargmin(z)
    tab.run("document.querySelector('#zf-panels svg').focus()")
    tab.press("ArrowRight")
    said = tab.wait("at('zf-row').querySelector('.peak') && at('zf-row').textContent")
    assert f"layer 1: ‖z‖ = {z[first]:.3g}, ‖f‖ = {f[first]:#.3g}" in said
    word = FIRST.token_texts[FIRST.catalogue.firings.tokens.reshape(-1)[first]]
    assert tab.run("at('zf-row').querySelector('.peak').textContent") == word
    # A point where the mouse is; the panel's own picture tells where that is.
    last = np.nanargmax(z)
    x, y = tab.run(
        "(d => { const s = document.querySelectorAll('#zf-panels svg')[1];"
        " s.scrollIntoView(); const b = s.getBoundingClientRect(),"
        " k = b.width / s.viewBox.baseVal.width;"
        " const [x, y] = d.match(/M([^M]*)h0$/)[1].split(' ').map(Number);"
        " return [b.x + k * x, b.y + k * y]; })"
        "(document.querySelectorAll('.rows')[1].getAttribute('d'))"
    )
    tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = tab.wait("!at('zf-row').querySelector('.peak') && at('zf-row').textContent")
    assert said.startswith(f"{HOSTILE}: ‖z‖ = {z[last]:#.3g}, ")


def test_the_list_sorts_by_every_column_in_both_directions(tab, path):
    tab.open(path)
    c, words = FIRST.catalogue, FIRST.token_texts
    tokens = c.firings.tokens.reshape(-1)
    keys = {
        "feature": np.arange(40),
        **{n: getattr(c, n) for n in ("density", "strength", "norm_ratio", "highest")},
        "strongest": [tokens[row] if row >= 0 else -1 for row in c.examples[:, 0]],
        "raised": c.raised[:, 0],
    }
    for name, column in keys.items():
        for direction in ("ascending", "descending"):
            tab.run(f"document.querySelector('[data-column={name}] button').click()")
            order = tab.run("list.order")
            assert sorted(order) == list(range(40))
            # The first is sorted when the page opens.
            ahead = name == "feature"
            expected = {"ascending": "descending", "descending": "ascending"}
            direction = expected[direction] if ahead else direction
            heading = f"document.querySelector('[data-column={name}]').ariaSort"
            assert tab.run(heading) == direction
            if name in ("strongest", "raised"):
                shown = [words[column[j]] if column[j] >= 0 else "" for j in order]
                rest = [text for text in shown if text]
                assert shown[len(rest) :] == [""] * (len(shown) - len(rest))
                ranks = tab.run(
                    f"{json.dumps(rest)}.map((t, i, a) => i ? "
                    "Math.sign(a[i - 1].localeCompare(t)) : 0)"
                )
                assert not {1 if direction == "ascending" else -1} & {*ranks}
            else:
                shown = np.array([column[j] for j in order])
                rest = shown[np.isfinite(shown)]
                assert np.isnan(shown[len(rest) :]).all()  # what is missing comes last
                steps = np.diff(rest) * (1 if direction == "ascending" else -1)
                assert (steps >= 0).all()


def test_a_search_finds_numbers_strongest_and_raised_tokens(tab, path):
    tab.open(path)
    c, words = FIRST.catalogue, FIRST.token_texts
    tokens = c.firings.tokens.reshape(-1)
    for query in ("w1", "RETURN", "·the", "17", "img src", "zzz"):
        type_in(tab, query)
        asked = query.lower().replace("·", " ")
        expected = [
            j
            for j in range(40)
            if str(j) == asked
            or any(
                asked in words[tokens[r]].lower() for r in c.examples[j, :8] if r >= 0
            )
            or any(asked in words[t].lower() for t in c.raised[j])
        ]
        found = tab.run("list.order")
        assert sorted(found) == expected
        assert found[:1] == [17] or query != "17"  # the number itself comes first
        count = tab.run("at('count').textContent")
        assert count == f"{len(expected)} of 40 features"
    assert features(tab) == []


def test_filters_choose_by_density_and_norm_ratio(tab, path):
    tab.open(path)
    c = FIRST.catalogue
    choose(tab, "filter", "dead")
    assert features(tab) == [3]
    choose(tab, "filter", "dense")
    assert features(tab) == np.flatnonzero(c.density > 0.1).tolist() == [5]
    choose(tab, "filter", "over")
    over = np.flatnonzero(c.norm_ratio > 1)
    assert tab.run("list.order") == over.tolist()
    type_in(tab, "return")  # both together
    assert 0 < len(features(tab)) < len(over)


def test_labels_are_listed_sorted_searched_and_scored(tab, path):
    tab.open(path)
    cells = "[...document.querySelectorAll('#features [id^=place]')]"
    cells += ".map(r => r.cells[3].textContent)"
    heading = "document.querySelector('[data-column=label]').offsetWidth"
    assert tab.run(heading) == 0  # the first SAE has none
    choose(tab, "sae", "1")
    tab.wait("list.sae === 1")
    assert tab.run(heading) > 100
    texts = SECOND.labels.text
    shown = tab.run(cells)
    assert shown == texts[: len(shown)]
    for down in (False, True):
        tab.run("document.querySelector('[data-column=label] button').click()")
        order = tab.run("list.order")
        assert order[-1] == 3  # what has no label comes last, either way
        listed = [texts[j] for j in order[:-1]]
        assert listed == sorted(listed, reverse=down)
    type_in(tab, "> or 5")
    found = [j for j in range(40) if j % 7 == 5]
    assert {*found} <= {*tab.run("list.order")}
    type_in(tab, "")
    tab.run(f"location.hash = nameOf({found[1]})")
    tab.wait(f"{TITLE} === 'Feature {found[1]}'")
    label = tab.run("document.querySelector('#detail .stands-for').textContent")
    assert label == texts[found[1]]
    figures = tab.run("document.querySelector('.figures').innerText").split("\n")
    for name in ("detection", "fuzzing"):
        value = getattr(SECOND.labels, name)[found[1]]
        place = next(i for i, line in enumerate(figures) if f"label: {name}" in line)
        assert f"{value:#.3g}" in figures[place] + figures[place + 1]
    assert tab.run("document.images.length") == 0


def test_a_click_shows_a_feature_with_its_examples(tab, path):
    tab.open(path)
    tab.run("document.querySelectorAll('#features [id^=place]')[5].click()")
    tab.wait(f"{TITLE} === 'Feature 5'")
    assert tab.run("location.hash") == "#mine%20k%3D3%2F4/feature/5"
    c, words = FIRST.catalogue, FIRST.token_texts
    tokens = c.firings.tokens.reshape(-1)
    assert tab.run("document.querySelectorAll('.example').length") == N_EXAMPLES
    labels = tab.run(
        "[...document.querySelectorAll('#detail > h4')].map(e => e.textContent)"
    )
    assert labels == ["Activations", *(label for label, _ in GROUPS)]
    rows, values = c.firings.of(5)
    by_row = dict(zip(rows.tolist(), values.tolist(), strict=True))
    for k, row in enumerate(c.examples[5].tolist()):
        start = row // 32 * 32
        low, high = max(start, row - 24), min(start + 32, row + 9)
        example = f"document.querySelectorAll('.example')[{k}]"
        text = "".join(words[t] for t in tokens[low:high])
        shown = tab.run(f"{example}.querySelector('p').textContent")
        before, after = "… " * (low > start), " …" * (high < start + 32)
        assert shown == before + text + after
        assert (
            tab.run(f"{example}.querySelector('.peak').textContent")
            == (words[tokens[row]])
        )
        shades = tab.run(
            f"[...{example}.querySelectorAll('.on')].map(e => "
            "[Number(e.style.getPropertyValue('--share')), e.title])"
        )
        fired = [by_row[r] for r in range(low, high) if r in by_row]
        assert len(shades) == len(fired)
        for (share, title), value in zip(shades, fired, strict=True):
            # One of 255 levels, and two decimals of its share.
            assert share == pytest.approx(value / c.highest[5], abs=1 / 255 + 0.005)
            assert float(title.removeprefix("activation ")) == pytest.approx(
                value, abs=float(c.highest[5]) / 255 + 0.005
            )
    figures = tab.run("document.querySelector('.figures').innerText").split()
    assert figures[figures.index("highest") + 1] == f"{c.highest[5]:#.3g}"
    bars = tab.run(
        "[...document.querySelectorAll('.histogram rect title')]"
        ".map(e => Number(e.textContent.match(/: (\\d+) rows/)[1]))"
    )
    assert bars == c.histogram[5].tolist()


def test_an_example_opens_to_its_whole_context(tab, path):
    tab.open(path, "#mine%20k%3D3%2F4/feature/5")
    words = FIRST.token_texts
    row = int(FIRST.catalogue.examples[5, 0])
    whole = "".join(words[t] for t in FIRST.catalogue.firings.tokens[row // 32])
    button = "document.querySelector('.example button')"
    shown = "document.querySelector('.example p').textContent"
    assert tab.run(shown) != whole
    tab.run(f"{button}.click()")
    assert tab.run(shown) == whole
    assert tab.run(f"{button}.ariaExpanded") == "true"
    tab.run(f"{button}.click()")
    assert tab.run(shown) != whole


def test_a_feature_shows_its_tokens_neighbours_and_steered_texts(tab, path):
    tab.open(path, "#mine%20k%3D3%2F4/feature/7")
    c, words = FIRST.catalogue, FIRST.token_texts
    lists = tab.run(
        "[...document.querySelectorAll('.columns ul')].map(u => "
        "[...u.children].map(li => [...li.childNodes].map(n => n.textContent)))"
    )
    for shown, ids, by in (
        (lists[0], c.raised[7], c.raised_by[7]),
        (lists[1], c.lowered[7], c.lowered_by[7]),
    ):
        assert [text for text, _ in shown] == [
            words[t].replace(" ", "·") for t in ids.tolist()
        ]
        amounts = [float(amount.replace("\u2212", "-")) for _, amount in shown]
        np.testing.assert_allclose(amounts, by, rtol=0.006)  # three digits
    assert [int(number) for number, _, _ in lists[2]] == c.nearest[7].tolist()
    assert tab.run("document.querySelector('#detail .steered').textContent") == HOSTILE
    tab.run("document.querySelector('.columns a').click()")
    tab.wait(f"{TITLE} === 'Feature {c.nearest[7, 0]}'")
    tab.run("document.querySelector('.sample a').click()")
    tab.wait(f"{TITLE} === 'Feature 7'")


def test_the_keyboard_is_enough(tab, path):
    tab.open(path)
    tab.press("/")
    assert tab.run(FOCUS) == "search"
    for letter in "w1/":  # a slash is a letter here
        tab.press(letter)
    assert tab.run("at('search').value") == "w1/"
    tab.run("at('search').value = ''; arrange()")
    tab.press("Escape")
    assert tab.run(FOCUS) == "features"
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp"):
        tab.press(key)
    assert tab.run("at('features').getAttribute('aria-activedescendant')") == "place2"
    tab.press("Enter")
    tab.wait(f"{TITLE} === 'Feature 2'")
    assert tab.run("document.activeElement.textContent") == "Feature 2"
    row = (
        "document.querySelector('#features [aria-selected=true]').cells[0].textContent"
    )
    assert tab.run(row) == "2"
    tab.press("Escape")
    tab.press("End")
    tab.press("Enter")
    tab.wait(f"{TITLE} === 'Feature 39'")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.run(outline) == "solid"  # where one is can be seen


def test_a_link_to_a_feature_opens_it(tab, path):
    tab.open(
        path, "#%3C%2Fscript%3E%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E/feature/12"
    )
    assert tab.run(TITLE) == "Feature 12"
    assert tab.run("at('sae').selectedOptions[0].textContent") == HOSTILE
    figures = tab.run("document.querySelector('.figures').innerText").split()
    highest = figures[figures.index("highest") + 1]
    assert highest == f"{SECOND.catalogue.highest[12]:#.3g}"
    choose(tab, "sae", "0")
    tab.wait("list.sae === 0")
    assert tab.run(TITLE) is None
    assert tab.run("location.hash") == ""
    tab.open(path, "#mine%20k%3D3%2F4/feature/40")
    assert "features 0 to 39; there is no 40" in tab.run("at('detail').textContent")
    tab.run("location.hash = '#mine%20k%3D3%2F4/feature/4'")
    tab.wait(f"{TITLE} === 'Feature 4'")
    tab.run("location.hash = ''")  # as the browser's button to go back does
    tab.wait("list.opened === null")
    assert "Choose a feature" in tab.run("at('detail').textContent")
    tab.open(path, "#%zz/feature/4")  # no name of any SAE
    assert tab.run(TITLE) is None


def test_a_dead_feature_has_no_examples(tab, path):
    tab.open(path, "#mine%20k%3D3%2F4/feature/3")
    assert "fired on none of the held-out rows" in tab.run("at('detail').textContent")
    assert tab.run("document.querySelectorAll('.example, .histogram').length") == 0


def test_text_of_tokens_is_never_markup(tab, path):
    tab.open(path)
    for feature in range(40):
        tab.run(f"open({feature})")
        tab.wait(f"{TITLE} === 'Feature {feature}'")
    assert tab.run("document.querySelectorAll('img, [onerror]').length") == 0
    assert HOSTILE in tab.run("document.body.textContent")


def test_many_features_keep_few_rows_in_the_page(tab, tmp_path):
    big = fake(n_features=25_000, n_contexts=64, width=64, per_feature=20, n_words=4000)
    path = tmp_path / "report.html"
    nothing = {"title": "", "summary": "", "rows": [], "figures": []}
    write_page(path, **nothing, config={}, about={}, browsers={"big": big})
    tab.open(path)
    rows = "document.querySelectorAll('#features tbody tr').length"
    assert tab.run(rows) < 60
    tab.run("at('scroller').scrollTop = 12000 * 28")
    tab.wait("at('place12000') !== null")
    assert tab.run(rows) < 60
    assert 12_000 in features(tab)
    tab.run("at('features').focus()")
    tab.press("End")
    assert features(tab)[-1] == 24_999
    assert tab.run("at('features').ariaRowCount") == "25001"
    type_in(tab, "w399")
    shown = features(tab)
    assert 0 < len(shown) < 60
    tab.run(f"open({shown[0]})")
    tab.wait(f"{TITLE} === 'Feature {shown[0]}'")
