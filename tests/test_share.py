"""Shares of batches: together the whole, whatever their number, also after a resume."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.activations import FromShards, Harvester, OnTheFly, Shards
from sae_jax.activations.from_shards import shuffled
from sae_jax.activations.in_memory import InMemory
from sae_jax.lm.sites import Run
from sae_jax.lm.source import Source
from sae_jax.share import WHOLE, Share, joined
from sae_jax.text.documents import Files
from tests.toys import (
    BOS,
    DOCUMENTS,
    PACKING,
    SITES,
    TOKENS,
    Characters,
    equal,
    in_order,
    on_the_fly,
    run_harvest,
)

BATCH, BUFFER, READERS, N_ROWS = 8, 32, 4, 50
KINDS, COUNTS = ("arrays", "shards", "text"), (1, 2, 4)
ARRAYS = {
    SITES[0]: np.arange(3.0 * N_ROWS).reshape(N_ROWS, 3),
    SITES[1]: -np.arange(1.0 * N_ROWS)[:, None],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    run_harvest(path, N_ROWS)
    return path


def read_text(**changes):
    options = {"batch": BATCH, "buffer": BUFFER, "readers": READERS}
    return on_the_fly(**options | changes)


@pytest.fixture(params=KINDS)
def open_stream(request, folder):
    """Opens one of the three kinds of streams with a share."""
    return {
        "arrays": lambda share: InMemory(ARRAYS, batch=BATCH, seed=5, share=share),
        "shards": lambda share: FromShards(
            Shards(folder), batch=BATCH, seed=5, share=share
        ),
        "text": lambda share: read_text(share=share),
    }[request.param]


def all_shares(count):
    return [Share(index, count) for index in range(count)]


def together(parts):
    return {site: np.concatenate([p[site] for p in parts]) for site in parts[0]}


def test_shares_one_after_another_are_the_whole_also_after_a_resume(open_stream):
    """Batches 0 to 10, then from 2 and 6, within groups, with every other number."""
    whole = open_stream(WHOLE)
    assert whole.batch == BATCH
    want, positions = [], []
    for t, batch in enumerate(itertools.islice(whole.batches(), 11)):
        want.append(batch)
        positions.append(whole.position(t))
    assert not equal(want[0], want[1])
    for count in COUNTS:
        streams = [open_stream(share) for share in all_shares(count)]
        assert {stream.batch for stream in streams} == {BATCH}
        assert all(stream.widths == whole.widths for stream in streams)
        drawn = zip(*(stream.batches() for stream in streams), strict=False)
        found = []
        for t, parts in enumerate(itertools.islice(drawn, 7)):
            assert all(len(x) == BATCH // count for p in parts for x in p.values())
            assert equal(together(parts), want[t])
            own = json.loads(json.dumps([stream.position(t) for stream in streams]))
            found.append(joined(own))
            assert found[t] == positions[t]
        for start, other in itertools.product((2, 6), COUNTS):
            again = [
                open_stream(share).batches(start, found[start])
                for share in all_shares(other)
            ]
            for t in range(start, start + 5):
                assert equal(together([next(part) for part in again]), want[t])


def test_shares_of_shards_read_no_other_rows_from_disk(folder, monkeypatch):
    shards, read = Shards(folder), []
    real = shards.rows
    monkeypatch.setattr(
        shards, "rows", lambda index, sites: read.append(index) or real(index, sites)
    )
    stream = FromShards(shards, batch=BATCH, seed=5, share=Share(2, 4)).batches()
    list(itertools.islice(stream, 4))
    order = shuffled(N_ROWS, BATCH, 5)
    own = {tuple(order[t][4:6]) for t in range(40)}  # some are read ahead
    assert 4 <= len(read) < 40
    assert {tuple(index) for index in read} <= own


def test_shares_of_arrays_look_at_no_other_rows():
    looked = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            if isinstance(index, np.ndarray):
                looked.append(index)
            return super().__getitem__(index)

    array = ARRAYS[SITES[0]].view(Watched)
    stream = InMemory({"a": array}, batch=BATCH, seed=5, share=Share(1, 2))
    list(itertools.islice(stream.batches(3), 2))
    order = shuffled(N_ROWS, BATCH, 5)
    assert [list(i) for i in looked] == [list(order[t][4:]) for t in (3, 4)]


class Echo(Source):
    """A model whose only site holds the tokens; it notes which it was given."""

    name, config, fingerprint = "echo", None, "echo"

    def __init__(self):
        self.seen = set()

    def width(self, site):
        return 1

    def run(self, tokens, *, read=(), write=None, logits=False, losses=False):
        self.seen |= set(np.asarray(tokens).ravel().tolist())
        values = jnp.asarray(tokens, jnp.float32)[..., None]
        return Run(values=dict.fromkeys(read, values), logits=None, losses=None)

    def gradients(self, *_, **__):
        raise NotImplementedError


class Listening(Characters):
    """Notes what it tokenises."""

    def __init__(self):
        self.heard = set()

    def __call__(self, text, **options):
        self.heard.add(text)
        return super().__call__(text, **options)


def echoed(documents=DOCUMENTS, tokenizer=TOKENS, **changes):
    """A stream of the tokens themselves, and the model that gives them."""
    model = Echo()
    options = {"batch": BATCH, "buffer": BUFFER, "readers": READERS, **changes}
    packing = options.pop("packing", PACKING)
    harvester = Harvester(model, ("site",), contexts_per_pass=4)
    return OnTheFly(harvester, documents, tokenizer, packing, **options), model


def dealt(epoch=0):
    """The texts of each reader, and their tokens: every document has one of its own."""
    texts = in_order(DOCUMENTS, epoch)
    texts = [set(texts[r::READERS]) for r in range(READERS)]
    tokens = [{t for x in own for t in TOKENS(x)["input_ids"]} for own in texts]
    assert sum(map(len, tokens)) == len(set.union(*tokens))
    return texts, tokens


def test_the_rows_of_a_reader_are_those_of_its_documents():
    _, tokens = dealt()
    stream, _ = echoed()
    found = [set() for _ in range(READERS)]
    for batch in itertools.islice(stream.batches(), 8):  # all of the first epoch
        rows = np.asarray(batch["site"]).reshape(READERS, -1)
        for reader, own in enumerate(rows):
            found[reader] |= set(own.astype(int).tolist())
    for own, allowed in zip(found, tokens, strict=True):
        assert own <= allowed
        assert len(own) > 2


@pytest.mark.parametrize("index", [0, 1])
def test_a_share_tokenises_and_runs_no_other_readers_text(index):
    texts, tokens = dealt()
    tokenizer = Listening()
    stream, model = echoed(tokenizer=tokenizer, share=Share(index, 2))
    list(itertools.islice(stream.batches(), 8))
    own = slice(2 * index, 2 * index + 2)
    assert tokenizer.heard <= set.union(*texts[own])
    assert model.seen <= set.union(*tokens[own]) | {BOS}
    assert len(tokenizer.heard) > 4


def test_a_resumed_share_reads_nothing_before_its_position():
    """From batch 8, whose group begins with the third block."""
    stream, _ = echoed()
    list(itertools.islice(stream.batches(), 8))
    position, tokenizer = stream.position(8), Listening()
    resumed, _ = echoed(tokenizer=tokenizer, share=Share(1, 2))
    next(resumed.batches(8, position))
    texts = in_order(DOCUMENTS)
    for reader in (2, 3):
        number = position["places"][str(reader)][0][0][1]
        assert number > 2 * READERS
        assert not tokenizer.heard & set(texts[reader:number:READERS])
    assert len(tokenizer.heard) > 4


def test_readers_have_orders_of_their_own():
    """All documents are the same, and so are the blocks of all readers."""
    text = "".join(chr(97 + i) for i in range(26))
    stream, _ = echoed(documents=Files([text] * 40, lambda name: name, 0))
    group = itertools.islice(stream.batches(), BUFFER // BATCH)
    rows = np.stack([np.asarray(b["site"]).reshape(READERS, -1) for b in group], 1)
    rows = rows.reshape(READERS, -1)
    assert len({tuple(own) for own in rows}) == READERS


def test_a_stream_ends_with_the_first_reader_whose_text_ends():
    stream, _ = echoed(packing=PACKING._replace(repeat=False))
    texts, _ = dealt()
    size, per_group = BUFFER // READERS, BUFFER // BATCH
    blocks = [sum(map(len, own)) // size for own in texts]
    assert min(blocks) < max(blocks)
    assert len(list(stream.batches())) == (min(blocks) - 1) * per_group


def test_readers_and_shares_that_do_not_go_together_are_refused(folder):
    for changes, fault in (
        ({"readers": 3}, "readers=3 must be at least 1 and divide the batch, 8"),
        ({"readers": 0}, "readers=0 must be at least 1 and divide"),
        ({"share": Share(0, 8)}, "readers=4 cannot be shared evenly by 8 processes"),
        ({"share": Share(2, 2)}, "share 2 of 2 is none; an index is at least 0"),
        (
            {"share": Share(0, 2), "packing": PACKING._replace(repeat=False)},
            "let a text that is shared repeat",
        ),
    ):
        with pytest.raises(ValueError, match=fault):
            read_text(**changes)
    shards = Shards(folder)
    for share, fault in (
        (Share(0, 3), "batch=8 cannot be shared evenly by 3 .*give a multiple of 3"),
        (Share(-1, 2), "share -1 of 2 is none"),
        (Share(0, 0), "share 0 of 0 is none"),
    ):
        with pytest.raises(ValueError, match=fault):
            FromShards(shards, batch=BATCH, share=share)
        with pytest.raises(ValueError, match=fault):
            InMemory(ARRAYS, batch=BATCH, share=share)


def test_positions_of_other_readers_and_of_a_share_alone_are_refused():
    four = read_text()
    for other in (1, 2, 8):
        position = read_text(readers=other).position(0)
        with pytest.raises(ValueError, match=f"readers was {other} and is 4, .*anew"):
            four.batches(0, position)
        with pytest.raises(ValueError, match=f"readers was 4 and is {other}, .*anew"):
            read_text(readers=other).batches(0, four.position(0))
    position = read_text(share=Share(1, 2)).position(0)
    with pytest.raises(ValueError, match=r"tells of readers 2, 3 of 4: .*a share"):
        four.batches(0, position)
    with pytest.raises(ValueError, match=r"another stream: .*lm was 'echo'"):
        four.batches(0, echoed()[0].position(0))


def test_positions_that_do_not_belong_together_are_not_joined():
    one, two = (read_text(share=share) for share in all_shares(2))
    next(one.batches())
    with pytest.raises(ValueError, match=r"at different batches.* number 1 has"):
        joined([one.position(BUFFER // BATCH), two.position(0)])
    streams = [
        InMemory(ARRAYS, batch=BATCH, seed=seed, share=share)
        for seed, share in enumerate(all_shares(2))
    ]
    with pytest.raises(ValueError, match="or read different streams"):
        joined([stream.position(0) for stream in streams])
    assert joined([None, None]) is None
