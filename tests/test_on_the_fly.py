"""Batches on the fly: which rows, in which order, and the same after a resume."""

import itertools
import json
from functools import partial
from typing import NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE, adam, init_state, make_step
from sae_jax.activations import Harvester
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.text.blocks import blocks
from sae_jax.text.contexts import Packing, contexts
from sae_jax.text.opening import open_documents
from sae_jax.text.tokenizer import load_tokenizer
from tests.toys import (
    BATCH,
    BUFFER,
    DOCUMENTS,
    PACKING,
    SITES,
    TOKENS,
    equal,
    on_the_fly,
    one_by_one,
    toy_documents,
    toy_harvester,
    toy_lm,
)


def test_rows_of_a_block_are_those_of_single_contexts():
    first, second, *_ = blocks(DOCUMENTS, TOKENS, PACKING._replace(repeat=False), 50)
    found = [toy_harvester().rows(block) for block in (first, second)]
    expected = one_by_one(100)
    for site in SITES:
        rows = np.concatenate([f[site] for f in found])
        np.testing.assert_allclose(rows, expected[site], atol=2e-6)


def test_groups_mix_two_blocks_and_use_every_row_once():
    n_groups, per_group = 5, BUFFER // BATCH
    stream = on_the_fly().batches()
    taken = list(itertools.islice(stream, n_groups * per_group))
    rows = one_by_one((n_groups + 1) * BUFFER)[SITES[0]]
    where = []
    for batch in taken:
        distance = np.abs(np.asarray(batch[SITES[0]])[:, None] - rows[None]).max(-1)
        assert (distance.min(1) < 2e-6).all()
        where.append(distance.argmin(1))
        # The rows of the two sites belong together.
        other = one_by_one((n_groups + 1) * BUFFER)[SITES[1]][where[-1]]
        np.testing.assert_allclose(batch[SITES[1]], other, atol=2e-6)
    flat = np.concatenate(where)
    assert len(set(flat)) == len(flat)
    for group in range(n_groups):
        block = flat[group * BUFFER : (group + 1) * BUFFER] // BUFFER
        assert sorted(block) == [group] * (BUFFER // 2) + [group + 1] * (BUFFER // 2)
    # All but the first half of block 0 and the half that waits for the next block.
    assert len(flat) == n_groups * BUFFER
    assert list(flat[:BATCH]) != sorted(flat[:BATCH])


class Numbers(Harvester):
    """Reads no model: each row is its own number in the text."""

    def rows(self, block):
        first = self.seen[0]
        self.seen[0] += len(block.row)
        return {"row": jnp.arange(first, self.seen[0], dtype=jnp.float32)[:, None]}


def numbers(n=None, **options):
    """Which rows a stream gives, in its order."""
    harvester = Numbers(toy_lm(), SITES)
    object.__setattr__(harvester, "seen", [0])
    stream = on_the_fly(harvester=harvester, **options).batches()
    return np.concatenate([b["row"][:, 0] for b in itertools.islice(stream, n)]).astype(
        int
    )


def mixed_by_hand(n_blocks, seed=0):
    """FAST's mixing buffer on numbers of rows: fill, shuffle, give half, refill."""
    key, held, groups = jax.random.key(seed), list(range(BUFFER)), []
    for block in range(1, n_blocks):
        full = held + list(range(block * BUFFER, (block + 1) * BUFFER))
        order = jax.random.permutation(jax.random.fold_in(key, block), 2 * BUFFER)
        shuffled = [full[i] for i in np.asarray(order)]
        groups.append(shuffled[:BUFFER])
        held = shuffled[BUFFER:]
    return [*groups, held]


def test_the_mixing_buffer_gives_every_row_once_half_of_it_at_a_time():
    """Until the text ends; what fills no block is left over."""
    packing = PACKING._replace(repeat=False)
    n = sum(int(c.use.sum()) for c in contexts(DOCUMENTS, TOKENS, packing))
    n_blocks = n // BUFFER
    flat = numbers(packing=packing, mixing="buffer")
    assert flat.tolist() == [r for group in mixed_by_hand(n_blocks) for r in group]
    assert sorted(flat) == list(range(n_blocks * BUFFER))


def test_a_row_waits_for_two_refills_on_average_in_the_mixing_buffer():
    """Neighbours wait for one and a half. Of the first blocks, all have gone."""
    n_groups, lags = 60, {}
    for mixing in ("buffer", "neighbours"):
        flat = numbers(n_groups * BUFFER // BATCH, mixing=mixing)
        assert len(set(flat.tolist())) == len(flat) == n_groups * BUFFER
        block, refill = flat // BUFFER, 1 + np.arange(len(flat)) // BUFFER
        lag = (refill - block + 1)[(block > 0) & (block < 40)]
        assert lag.min() == 1
        lags[mixing] = lag.mean()
    assert abs(lags["buffer"] - 2) < 0.15
    assert abs(lags["neighbours"] - 1.5) < 0.05


@pytest.mark.parametrize(
    ("with_position", "readers"), [(True, 1), (False, 1), (True, 2)]
)
def test_the_mixing_buffer_resumes_bit_for_bit(with_position, readers):
    """With a position, from the first block on that something is left of."""
    make = partial(on_the_fly, mixing="buffer", readers=readers)
    whole = make()
    seen, positions = [], []
    for t, batch in enumerate(itertools.islice(whole.batches(), 50)):
        seen.append(batch)
        positions.append(json.loads(json.dumps(whole.position(t))))
    for start in (0, 3, 4, 17, 40, 49):
        position = positions[start] if with_position else None
        fresh = make()
        found = fresh.batches(start, position)
        for again, before in zip(found, seen[start:], strict=False):
            assert equal(again, before)
        if with_position:
            assert json.loads(json.dumps(fresh.position(start))) == position
    if readers == 1:  # two of them read other documents each
        assert positions[49]["place"] not in (None, positions[0]["place"])
    neighbours = itertools.islice(on_the_fly(readers=readers).batches(), 5)
    assert not equal(seen[4], [*neighbours][4])


def test_the_end_of_a_text_resumes_too():
    packing = PACKING._replace(repeat=False)
    make = partial(on_the_fly, packing=packing, mixing="buffer")
    whole = make()
    seen = list(whole.batches())
    for back in (1, 3, 5, 9):
        start = len(seen) - back
        rest = list(make().batches(start, whole.position(start)))
        assert len(rest) == back
        assert all(equal(a, b) for a, b in zip(rest, seen[start:], strict=True))


def test_an_unknown_mixing_is_refused(as_users):
    with pytest.raises(ValueError, match="Unknown mixing 'pairs'"):
        on_the_fly(mixing="pairs")


def block_of(documents, packing):
    tokenizer = load_tokenizer("embedded", chat_template="plain")
    [block] = blocks(documents, tokenizer, packing, 10_000)
    return block


@pytest.mark.parametrize("gradients", [(), ("resid_post.1",)])
def test_no_activation_of_a_dialogue_depends_on_the_one_before(gradients):
    """To the last bit; joined, as in block training, it does. Lengths differ."""
    lm, site = FlaxLM.load("embedded"), "resid_post.1"
    a = [{"role": "user", "content": "def read(path):\n    return open(path).read()"}]
    others = {
        "short": [{"role": "user", "content": "import re"}],
        "long": [{"role": "user", "content": "for line in lines: print(line)\n" * 14}],
    }
    harvester = Harvester(lm, (site,), 2, gradients=gradients)
    alone = Packing(200, join=False, whole=True, use_bos=True, repeat=False)
    joined = Packing(200, use_bos=True, repeat=False)
    for packing, same in ((alone, True), (joined, False)):
        first = harvester.rows(block_of(Listed([a]), packing))
        for other in others.values():
            both = harvester.rows(block_of(Listed([other, a, other]), packing))
            n = len(block_of(Listed([other]), packing).row)
            for name, rows in first.items():
                after = both[name][n : n + len(rows)]
                assert (np.asarray(after) == np.asarray(rows)).all() == same


class Listed(NamedTuple):
    """Documents in a list."""

    all: list

    def fingerprint(self):
        return str(self.all)

    def read(self, position=None):
        epoch, start = position or (0, 0)
        for i, one in enumerate(self.all[start:], start):
            yield [epoch, i], one

    def after(self, position):
        return [(position or (0, 0))[0] + 1, 0]


def test_passes_are_as_long_as_their_contexts_need_and_rows_stay_in_place(monkeypatch):
    lm, sizes = FlaxLM.load("embedded"), []
    texts = ["x = 1\n" * n for n in (3, 60, 2, 45, 50)]
    packing = Packing(256, join=False, repeat=False)
    block = block_of(Listed(texts), packing)
    run = FlaxLM.run

    def counted(self, tokens, **options):
        sizes.append(tokens.shape)
        return run(self, tokens, **options)

    monkeypatch.setattr(FlaxLM, "run", counted)
    rows = Harvester(lm, ("mlp_out.0",), 2).rows(block)["mlp_out.0"]
    assert sizes == [(2, 128), (2, 256), (2, 256)]
    assert len(block.tokens) == 5
    for i, tokens in enumerate(block.tokens):
        alone = run(lm, tokens[None], read=("mlp_out.0",)).values["mlp_out.0"][0]
        mine = block.row == i
        np.testing.assert_allclose(
            rows[mine], np.asarray(alone)[block.column[mine]], atol=1e-4
        )


@pytest.fixture
def streamed(tmp_path):
    """The same documents as rows of a Hugging Face stream."""
    path = tmp_path / "rows.parquet"
    texts = [text for _, text in DOCUMENTS.read()]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return open_documents(str(path), part="all")


@pytest.mark.parametrize("with_position", [True, False])
@pytest.mark.parametrize("kind", ["files", "streamed"])
def test_on_the_fly_resumes_bit_for_bit(with_position, kind, streamed):
    documents = DOCUMENTS if kind == "files" else streamed
    make = partial(on_the_fly, documents=documents)
    whole = make()
    seen, positions = [], []
    for t, batch in enumerate(itertools.islice(whole.batches(), 18)):
        seen.append(batch)
        positions.append(json.loads(json.dumps(whole.position(t))))
    for start in [0, 1, 3, 4, 7, 11, 12, 17]:
        position = positions[start] if with_position else None
        fresh = make().batches(start, position)
        for again, before in zip(fresh, seen[start:], strict=False):
            assert equal(again, before)
    different = next(make(seed=1).batches())
    assert not equal(different, seen[0])


def test_the_position_after_the_last_batch_of_a_group_is_known():
    stream = on_the_fly()
    n = 2 * BUFFER // BATCH
    drawn = list(itertools.islice(stream.batches(), n))
    position = json.loads(json.dumps(stream.position(n)))
    rest = next(on_the_fly().batches(n, position))
    expected = list(itertools.islice(on_the_fly().batches(), n + 1))
    assert equal(drawn[-1], expected[-2])
    assert equal(rest, expected[-1])


def test_on_the_fly_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="buffer=18 must be a multiple of twice"):
        on_the_fly(buffer=18)
    stream = on_the_fly()
    with pytest.raises(ValueError, match="place of batch 99 is not known"):
        stream.position(99)
    with pytest.raises(ValueError, match="position is that of group 0"):
        next(stream.batches(BUFFER // BATCH, stream.position(0)))
    other = on_the_fly(documents=toy_documents(39))
    with pytest.raises(ValueError, match="belongs to another stream: text was"):
        next(other.batches(0, stream.position(0)))


def test_positions_of_other_settings_are_refused_and_new_ones_known_at_once():
    stream = on_the_fly()
    next(stream.batches())
    position = json.loads(json.dumps(stream.position(0)))
    for changes, name in (
        ({"seed": 1}, "seed"),
        ({"packing": PACKING._replace(skip=1)}, "packing"),
        ({"buffer": 2 * BUFFER}, "buffer"),
    ):
        with pytest.raises(ValueError, match=f"another stream: .*{name} was"):
            on_the_fly(**changes).batches(0, position)
    with pytest.raises(ValueError, match="start=-1 must not be negative"):
        stream.batches(-1)
    resumed = on_the_fly()
    resumed.batches(2, position)
    assert resumed.position(2) == position


def test_a_stream_that_ends_ends():
    packing = PACKING._replace(repeat=False)
    stream = on_the_fly(packing=packing)
    n = sum(int(c.use.sum()) for c in contexts(DOCUMENTS, TOKENS, packing))
    assert len(list(stream.batches())) == (n // BUFFER - 1) * (BUFFER // BATCH)


def test_streams_train_an_sae_on_several_sites_from_one_pass():
    """One pass of the model, two SAEs and a transcoder."""
    stream = on_the_fly()
    widths = stream.widths
    saes = {
        site: SAE(width, 32, rule="topk(k=4)", treatment="standardise")
        for site, width in widths.items()
    }
    steps = {site: make_step(sae, adam(1e-2)) for site, sae in saes.items()}
    states = {
        site: init_state(sae, adam(1e-2), jax.random.key(0))
        for site, sae in saes.items()
    }
    losses: dict[str, list[float]] = {site: [] for site in SITES}
    for batch in itertools.islice(stream.batches(), 60):
        for site in SITES:
            states[site], metrics = steps[site](states[site], {"x": batch[site]})
            losses[site].append(float(metrics["loss"]))
    for site in SITES:
        assert np.mean(losses[site][-5:]) < 0.7 * np.mean(losses[site][:5])
