"""The end-to-end benchmark, ours alone, at a tiny size."""

import itertools
import json

import jax
import numpy as np
import pytest

from experiments import bench_train
from experiments.bench_train import Config

TINY = dict(
    saelens_python="",
    layers=2,
    width=16,
    heads=2,
    vocab_size=50,
    layer=1,
    context=8,
    contexts_per_pass=2,
    buffer=64,
    batch=16,
    n_features=32,
    k=2,
    rounds=3,
)


def test_ours_alone_gives_a_row_and_a_file(tmp_path, capsys):
    (row,) = bench_train.run(Config(out=str(tmp_path), **TINY))
    stored = json.loads((tmp_path / "bench_train.json").read_text())
    assert stored["rows"] == [row]
    assert stored["config"]["n_features"] == 32
    assert row["system"] == "sae_jax"
    assert row["tokens_per_s"] == pytest.approx(64 / row["seconds"])
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
    assert row["ratio_to_ours"] == 1
    assert f"{row['tokens_per_s']:,.0f}" in capsys.readouterr().out


def test_a_round_reads_as_many_tokens_as_it_trains_on(monkeypatch):
    """Rounds are alike: each reads one block, and at most one pass for its border."""
    passes = []
    stream = bench_train.open_stream(Config(**TINY), "resid_pre.1")
    run = type(stream.harvester.lm).run
    monkeypatch.setattr(
        type(stream.harvester.lm),
        "run",
        lambda lm, tokens, **more: (
            passes.append(tokens.size) or run(lm, tokens, **more)
        ),
    )
    batches = stream.batches()
    read = []
    for _ in range(3):
        rows = list(itertools.islice(batches, 64 // 16))
        assert all(r["resid_pre.1"].shape == (16, 16) for r in rows)
        read.append(sum(passes))
    first, second = np.diff(read)
    assert first == second
    assert 64 <= first <= 64 + 2 * 8


def test_ratios_are_medians_within_rounds():
    times = {"sae_jax": [1.0, 2.0, 10.0], "SAELens": [2.0, 6.0, 10.0]}
    row = bench_train.row(Config(**TINY), "SAELens", times)
    assert (row["seconds"], row["seconds_min"], row["seconds_max"]) == (6, 2, 10)
    assert row["ratio_to_ours"] == 2
    assert row["tokens_per_s"] == pytest.approx(64 / 6)


def test_faults_say_what_does_not_fit(tmp_path):
    for changes, fault in (
        ({"buffer": 48}, "buffer=48 must be a multiple of two batches, 32"),
        ({"batch": 4, "buffer": 24}, "and of a pass of the model, 16"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"saelens_python": "/no"}, "saelens_python='/no' does not exist; `make"),
    ):
        config = Config(out=str(tmp_path / "out"), **{**TINY, **changes})
        with pytest.raises(ValueError, match=fault):
            bench_train.run(config)
    assert not (tmp_path / "out").exists()
    assert list(Config(**TINY).faults()) == []


def test_training_goes_on_from_round_to_round():
    once = bench_train.ours(Config(**TINY))
    before = len(jax.live_arrays())
    assert once() > 0
    assert once() > 0
    assert len(jax.live_arrays()) <= before + 2  # nothing piles up
