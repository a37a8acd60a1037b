"""Both streams of batches, the harvest and its shards."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import datasets
import jax
import ml_dtypes
import numpy as np
import pytest
from transformers import GPT2Config

from sae_jax.activations import FromShards, Harvester, OnTheFly, Shards, harvest
from sae_jax.activations import shards as shards_module
from sae_jax.activations.shards import ShardError
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.text.blocks import blocks
from sae_jax.text.contexts import Packing, contexts
from sae_jax.text.documents import open_documents
from tests.toy_text import Characters, toy_documents

SITES = ("resid_post.0", "mlp_hidden.1")
DOCUMENTS, TOKENS, PACKING = toy_documents(40), Characters(), Packing(8)
BATCH, BUFFER = 6, 24


@pytest.fixture(scope="module")
def lm():
    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    return FlaxLM.random(config)


@pytest.fixture(scope="module")
def harvester(lm):
    return Harvester(lm, SITES, contexts_per_pass=4)


@pytest.fixture(scope="module")
def one_by_one(lm):
    """All used rows of the first epochs, each context given to the model alone."""

    def read(n: int) -> dict[str, np.ndarray]:
        rows: dict[str, list] = {site: [] for site in SITES}
        for context in contexts(DOCUMENTS, TOKENS, PACKING):
            values = lm.run(context.tokens[None], read=SITES).values
            for site in SITES:
                rows[site].extend(np.asarray(values[site][0])[context.use])
            if len(rows[SITES[0]]) >= n:
                break
        return {site: np.stack(rows[site])[:n] for site in SITES}

    return read


def on_the_fly(harvester, documents=DOCUMENTS, **changes) -> OnTheFly:
    options = {"batch": BATCH, "buffer": BUFFER, "seed": 0} | changes
    return OnTheFly(harvester, documents, TOKENS, PACKING, **options)


def run_harvest(folder, harvester, rows=50, *, documents=DOCUMENTS, **changes):
    options = {"rows_per_shard": 20, "text": {"dataset": "toy"}} | changes
    packing = PACKING._replace(repeat=False)
    return harvest(folder, harvester, documents, TOKENS, packing, rows=rows, **options)


@pytest.fixture(scope="module")
def folder(harvester, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    run_harvest(path, harvester)
    return path


def equal(a: dict, b: dict) -> bool:
    return all((np.asarray(a[site]) == np.asarray(b[site])).all() for site in SITES)


def test_rows_of_a_block_are_those_of_single_contexts(harvester, one_by_one):
    first, second, *_ = blocks(DOCUMENTS, TOKENS, PACKING._replace(repeat=False), 50)
    found = [harvester.rows(block) for block in (first, second)]
    expected = one_by_one(100)
    for site in SITES:
        rows = np.concatenate([f[site] for f in found])
        np.testing.assert_allclose(rows, expected[site], atol=2e-6)


def test_groups_mix_two_blocks_and_use_every_row_once(harvester, one_by_one):
    n_groups, per_group = 5, BUFFER // BATCH
    stream = on_the_fly(harvester).batches()
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
def test_on_the_fly_resumes_bit_for_bit(harvester, with_position, kind, streamed):
    documents = DOCUMENTS if kind == "files" else streamed
    make = partial(on_the_fly, harvester, documents=documents)
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


def test_the_position_after_the_last_batch_of_a_group_is_known(harvester):
    stream = on_the_fly(harvester)
    n = 2 * BUFFER // BATCH
    drawn = list(itertools.islice(stream.batches(), n))
    position = json.loads(json.dumps(stream.position(n)))
    rest = next(on_the_fly(harvester).batches(n, position))
    expected = list(itertools.islice(on_the_fly(harvester).batches(), n + 1))
    assert equal(drawn[-1], expected[-2])
    assert equal(rest, expected[-1])


def test_on_the_fly_refuses_what_cannot_be(harvester):
    with pytest.raises(ValueError, match="buffer=18 must be a multiple of twice"):
        on_the_fly(harvester, buffer=18)
    stream = on_the_fly(harvester)
    with pytest.raises(ValueError, match="place of batch 99 is not known"):
        stream.position(99)
    with pytest.raises(ValueError, match="position is that of group 0"):
        next(stream.batches(BUFFER // BATCH, stream.position(0)))
    other = on_the_fly(harvester, documents=toy_documents(39))
    with pytest.raises(ValueError, match="position belongs to another text"):
        next(other.batches(0, stream.position(0)))


def test_a_stream_that_ends_ends(harvester):
    packing = PACKING._replace(repeat=False)
    stream = OnTheFly(harvester, DOCUMENTS, TOKENS, packing, batch=BATCH, buffer=BUFFER)
    n = sum(int(c.use.sum()) for c in contexts(DOCUMENTS, TOKENS, packing))
    assert len(list(stream.batches())) == (n // BUFFER - 1) * (BUFFER // BATCH)


def test_a_harvest_stores_rows_and_where_they_come_from(folder, one_by_one, lm):
    shards = Shards(folder)
    expected = one_by_one(50)
    rows = shards.rows(np.arange(50), SITES)
    for site in SITES:
        np.testing.assert_allclose(rows[site], expected[site], atol=2e-6)
        assert shards.widths[site] == lm.width(site)
    tokens, positions = shards.contexts(np.array([49, 0, 21]))
    values = lm.run(tokens, read=SITES).values
    for i, row in enumerate([49, 0, 21]):
        np.testing.assert_allclose(
            values[SITES[0]][i, positions[i]], expected[SITES[0]][row], atol=2e-6
        )
    assert [entry.rows for entry in shards.manifest["shards"]] == [20, 20, 10]


def test_bfloat16_shards_are_the_rounded_rows(harvester, folder, tmp_path):
    run_harvest(tmp_path, replace(harvester, dtype="bfloat16"))
    exact = Shards(folder).rows(np.arange(50), SITES)
    rounded = Shards(tmp_path).rows(np.arange(50), SITES)
    for site in SITES:
        assert rounded[site].dtype == ml_dtypes.bfloat16
        expected = exact[site].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(rounded[site], expected)
    batch = next(FromShards(Shards(tmp_path), batch=8).batches())
    assert batch[SITES[0]].dtype == np.float32


def test_a_harvest_is_extended_as_if_it_had_never_stopped(harvester, folder, tmp_path):
    for rows in (20, 33, 10, 50):
        run_harvest(tmp_path, harvester, rows)
    assert [e.rows for e in Shards(tmp_path).manifest["shards"]] == [20, 13, 17]
    index = np.arange(50)
    # Other passes of the model over the same contexts: not to the last bit.
    for site, rows in Shards(tmp_path).rows(index, SITES).items():
        np.testing.assert_allclose(
            rows, Shards(folder).rows(index, SITES)[site], atol=2e-6
        )


def test_a_text_that_ends_is_said_and_kept(harvester, tmp_path, capfd):
    manifest = run_harvest(tmp_path, harvester, 10_000)
    packing = PACKING._replace(repeat=False)
    n = sum(int(c.use.sum()) for c in contexts(DOCUMENTS, TOKENS, packing))
    assert sum(entry.rows for entry in manifest["shards"]) == n
    assert f"ended after {n} of 10000 rows" in capfd.readouterr().out


KILLED = """
import sys
from pathlib import Path
from tests import test_activations as t
from sae_jax.lm.flax_lm import FlaxLM
lm = FlaxLM.random(t.GPT2Config(
    vocab_size=64, n_positions=8, n_embd=16, n_layer=2, n_head=2))
print("ready", flush=True)
t.run_harvest(Path(sys.argv[1]), t.Harvester(lm, t.SITES, 4), 150, rows_per_shard=5,
              documents=t.toy_documents(60))
"""


def test_a_killed_harvest_goes_on_bit_for_bit(harvester, tmp_path):
    """Killed by SIGKILL at whatever moment; what is there afterwards is whole."""
    start = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    process = subprocess.Popen(start, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.safetensors"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    n_before = len(Shards(tmp_path / "killed"))
    options = {"rows_per_shard": 5, "documents": toy_documents(60)}
    run_harvest(tmp_path / "killed", harvester, 150, **options)
    run_harvest(tmp_path / "whole", harvester, 150, **options)
    killed, whole = Shards(tmp_path / "killed"), Shards(tmp_path / "whole")
    assert n_before < len(killed) == 150
    assert [e.sha256 for e in killed.manifest["shards"]] == [
        e.sha256 for e in whole.manifest["shards"]
    ]


def test_shards_give_every_row_once_per_epoch_in_another_order(folder):
    shards = Shards(folder)
    rows = shards.rows(np.arange(50), SITES)[SITES[0]]
    stream = FromShards(shards, batch=10).batches()
    epochs = []
    for _ in range(2):
        taken = np.concatenate([next(stream)[SITES[0]] for _ in range(5)])
        distance = np.abs(taken[:, None] - rows[None]).max(-1)
        epochs.append(distance.argmin(1))
        assert sorted(epochs[-1]) == list(range(50))
    assert list(epochs[0]) != list(epochs[1])
    assert set(epochs[0][:10]) - set(range(20)), "one shuffle over all shards"


def test_from_shards_resumes_everywhere(folder):
    make = partial(FromShards, Shards(folder), batch=12, seed=5)
    seen = list(itertools.islice(make().batches(), 14))
    for start in range(14):
        for again, before in zip(make().batches(start), seen[start:], strict=False):
            assert equal(again, before)
    assert not equal(
        next(FromShards(Shards(folder), batch=12, seed=6).batches()), seen[0]
    )
    position = json.loads(json.dumps(make().position(3)))
    assert equal(next(make().batches(3, position)), seen[3])
    with pytest.raises(ValueError, match=r"belongs to other shards, or .* has grown"):
        next(make().batches(3, position | {"rows": 49}))


def damage_size(path):
    with path.open("ab") as file:
        file.write(b"x")


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def damage_header(path):
    data = bytearray(path.read_bytes())
    data[8:20] = b"x" * 12
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: os.truncate(p, 100), "has 100 bytes instead of"),
        (damage_size, "bytes instead of"),
        (damage_byte, "checksum is not the manifest's"),
        (damage_header, "damaged or foreign"),
        (lambda p: (p.parent / "manifest.json").unlink(), r"has no manifest\.json"),
        (lambda p: (p.parent / "manifest.json").write_text("{"), "is damaged"),
    ],
)
def test_damaged_shards_are_refused(folder, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy / "shard-00001.safetensors")
    with pytest.raises(ShardError, match=message):
        Shards(copy)


def test_a_shard_of_another_harvest_is_refused(folder, harvester, tmp_path):
    run_harvest(tmp_path, harvester, text={"dataset": "another"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    name = "shard-00000.safetensors"
    shutil.copy(folder / name, tmp_path / name)
    manifest["shards"][0] = Shards(folder).manifest["shards"][0]._asdict()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="made by another harvest"):
        Shards(tmp_path)


def test_a_harvest_does_not_go_on_with_other_settings(harvester, tmp_path):
    run_harvest(tmp_path, harvester, 20)
    with pytest.raises(ShardError, match="dtype was 'float32' and is 'bfloat16'"):
        run_harvest(tmp_path, replace(harvester, dtype="bfloat16"), 40)
    other = FlaxLM.random(harvester.lm.config, seed=1)
    with pytest.raises(ShardError, match="weights was"):
        run_harvest(tmp_path, replace(harvester, lm=other), 40)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(ShardError, match="is not empty and has no manifest"):
        run_harvest(tmp_path / "else", harvester)


def test_a_full_disk_keeps_what_is_written(harvester, folder, tmp_path, monkeypatch):
    with pytest.raises(ShardError, match="harvest fewer rows or sites"):
        run_harvest(tmp_path, harvester, free=lambda path: 1000)
    real, calls = shards_module.save_file, itertools.count()

    def full(arrays, path, metadata):
        real(arrays, path, metadata)
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module, "save_file", full)
    with pytest.raises(ShardError, match="20 rows are safe"):
        run_harvest(tmp_path, harvester)
    assert not list(tmp_path.glob("*.unfinished"))
    assert len(Shards(tmp_path)) == 20
    monkeypatch.undo()
    run_harvest(tmp_path, harvester)
    index = np.arange(50)
    assert equal(Shards(tmp_path).rows(index, SITES), Shards(folder).rows(index, SITES))


def test_from_shards_refuses_what_is_not_there(folder):
    with pytest.raises(ValueError, match=r"holds no resid_pre\.0; it holds"):
        FromShards(Shards(folder), batch=4, sites=("resid_pre.0",))
    with pytest.raises(ValueError, match="batch=51 must be from 1 to 50"):
        FromShards(Shards(folder), batch=51)


def test_streams_train_an_sae_on_several_sites_from_one_pass(harvester):
    """One pass of the model, two SAEs and a transcoder."""
    from sae_jax import SAE, adam, init_state, make_step

    stream = on_the_fly(harvester)
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
