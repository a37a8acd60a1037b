"""Batches on the fly: which rows, in which order, and the same after a resume."""

import itertools
import json
from functools import partial

import datasets
import jax
import numpy as np
import pytest

from sae_jax import SAE, adam, init_state, make_step
from sae_jax.text.blocks import blocks
from sae_jax.text.contexts import contexts
from sae_jax.text.opening import open_documents
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
