"""The harvest, its shards, and the batches that are drawn from them."""

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

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError

from sae_jax.activations import FromShards, Shards
from sae_jax.activations import shards as shards_module
from sae_jax.activations.shards import ShardError
from sae_jax.text.contexts import contexts
from tests.toys import (
    DOCUMENTS,
    PACKING,
    SITES,
    TOKENS,
    equal,
    one_by_one,
    run_harvest,
    toy_documents,
    toy_harvester,
    toy_lm,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    run_harvest(path)
    return path


def test_a_harvest_stores_rows_and_where_they_come_from(folder):
    shards = Shards(folder)
    expected = one_by_one(50)
    rows = shards.rows(np.arange(50), SITES)
    for site in SITES:
        np.testing.assert_allclose(rows[site], expected[site], atol=2e-6)
        assert shards.widths[site] == toy_lm().width(site)
    tokens, positions = shards.contexts(np.array([49, 0, 21]))
    values = toy_lm().run(tokens, read=SITES).values
    for i, row in enumerate([49, 0, 21]):
        np.testing.assert_allclose(
            values[SITES[0]][i, positions[i]], expected[SITES[0]][row], atol=2e-6
        )
    assert [entry.rows for entry in shards.manifest["shards"]] == [20, 20, 10]


def test_bfloat16_shards_are_the_rounded_rows(folder, tmp_path):
    run_harvest(tmp_path, harvester=replace(toy_harvester(), dtype="bfloat16"))
    exact = Shards(folder).rows(np.arange(50), SITES)
    rounded = Shards(tmp_path).rows(np.arange(50), SITES)
    for site in SITES:
        assert rounded[site].dtype == ml_dtypes.bfloat16
        expected = exact[site].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(rounded[site], expected)
    batch = next(FromShards(Shards(tmp_path), batch=8).batches())
    assert batch[SITES[0]].dtype == np.float32


def test_a_harvest_is_extended_as_if_it_had_never_stopped(folder, tmp_path):
    for rows in (20, 33, 10, 50):
        run_harvest(tmp_path, rows)
    assert [e.rows for e in Shards(tmp_path).manifest["shards"]] == [20, 13, 17]
    index = np.arange(50)
    # Other passes of the model over the same contexts: not to the last bit.
    for site, rows in Shards(tmp_path).rows(index, SITES).items():
        np.testing.assert_allclose(
            rows, Shards(folder).rows(index, SITES)[site], atol=2e-6
        )


def test_a_text_that_ends_is_said_and_kept(tmp_path, capfd):
    manifest = run_harvest(tmp_path, 10_000)
    packing = PACKING._replace(repeat=False)
    n = sum(int(c.use.sum()) for c in contexts(DOCUMENTS, TOKENS, packing))
    assert sum(entry.rows for entry in manifest["shards"]) == n
    assert f"ended after {n} of 10000 rows" in capfd.readouterr().out


KILLED = """
import sys
from pathlib import Path
from tests import toys
toys.toy_harvester()
print("ready", flush=True)
toys.run_harvest(
    Path(sys.argv[1]), 150, rows_per_shard=5, documents=toys.toy_documents(60)
)
"""


def test_a_killed_harvest_goes_on_bit_for_bit(tmp_path):
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
    run_harvest(tmp_path / "killed", 150, **options)
    run_harvest(tmp_path / "whole", 150, **options)
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


def test_a_shard_of_another_harvest_is_refused(folder, tmp_path):
    run_harvest(tmp_path, text={"dataset": "another"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    name = "shard-00000.safetensors"
    shutil.copy(folder / name, tmp_path / name)
    manifest["shards"][0] = Shards(folder).manifest["shards"][0]._asdict()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="made by another harvest"):
        Shards(tmp_path)


def test_a_harvest_does_not_go_on_with_other_settings(tmp_path):
    run_harvest(tmp_path, 20)
    with pytest.raises(ShardError, match="dtype was 'float32' and is 'bfloat16'"):
        run_harvest(tmp_path, 40, harvester=replace(toy_harvester(), dtype="bfloat16"))
    with pytest.raises(ShardError, match="weights was"):
        run_harvest(tmp_path, 40, harvester=replace(toy_harvester(), lm=toy_lm(1)))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(ShardError, match="is not empty and has no manifest"):
        run_harvest(tmp_path / "else")


def test_a_damaged_shard_is_written_again_as_its_message_says(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "shard-00001.safetensors").unlink()
    run_harvest(tmp_path / "copy")
    index = np.arange(50)
    again, before = Shards(tmp_path / "copy"), Shards(folder)
    assert equal(again.rows(index, SITES), before.rows(index, SITES))


def test_only_a_few_batches_are_read_ahead(folder, monkeypatch):
    shards, calls = Shards(folder), []
    real = shards.rows
    monkeypatch.setattr(shards, "rows", lambda *a: calls.append(1) or real(*a))
    next(FromShards(shards, batch=10).batches())
    time.sleep(1)
    assert len(calls) < 12


def test_a_full_disk_keeps_what_is_written(folder, tmp_path, monkeypatch):
    with pytest.raises(ShardError, match="harvest fewer rows or sites"):
        run_harvest(tmp_path, free=lambda path: 1000)
    real, calls = shards_module.save_file, itertools.count()

    def full(arrays, path, metadata):
        real(arrays, path, metadata)
        if next(calls) == 1:
            raise SafetensorError("I/O error: No space left (os error 28)")

    monkeypatch.setattr(shards_module, "save_file", full)
    with pytest.raises(ShardError, match="20 rows are safe"):
        run_harvest(tmp_path)
    assert not list(tmp_path.glob("*.unfinished"))
    assert len(Shards(tmp_path)) == 20
    monkeypatch.undo()
    run_harvest(tmp_path)
    index = np.arange(50)
    assert equal(Shards(tmp_path).rows(index, SITES), Shards(folder).rows(index, SITES))


def test_from_shards_refuses_what_is_not_there(folder):
    with pytest.raises(ValueError, match=r"holds no resid_pre\.0; it holds"):
        FromShards(Shards(folder), batch=4, sites=("resid_pre.0",))
    with pytest.raises(ValueError, match="batch=51 must be from 1 to 50"):
        FromShards(Shards(folder), batch=51)
