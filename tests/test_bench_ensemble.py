"""The benchmark of SAEs side by side: its turns, its rows, and a tiny run of all."""

import json
import threading
from contextlib import ExitStack
from dataclasses import dataclass

import jax
import pytest

from experiments import _bench_turns, bench_ensemble
from experiments._bench_turns import Turns, started, taken, until_the_last
from experiments._bench_workers import Worker
from sae_jax import settings

CHILD = "tests.bench_child"
COLUMNS = (
    "rule n F measured how B D ms ms_min ms_max throughput compile_s tokens_per_s "
    "peak_mb"
).split()
TINY = dict(
    rules="topk(k=2)",
    seeds="3,5",
    batch="64",
    width="8",
    n_features="32",
    steps="2",
    buffer="128",
    contexts_per_pass="1",
    rounds="1",
)


def configured(**given: str) -> bench_ensemble.Config:
    config, faults = settings.build(bench_ensemble.Config(), {**TINY, **given})
    assert faults == []
    return config


def test_it_leaves_rows_and_a_table(tmp_path, capsys, monkeypatch):
    # The processes share what was compiled, as tests do.
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    rows = bench_ensemble.run(configured(out=str(tmp_path)))
    assert json.loads((tmp_path / "bench_ensemble.json").read_text()) == rows
    assert [(row["measured"], row["how"], row["D"]) for row in rows] == [
        ("steps", "alone", 8),
        ("steps", "1 at once", 8),
        ("steps", "2 at once", 8),
        ("tokens", "processes", 192),
        ("tokens", "side by side", 192),
    ]
    for row in rows:
        assert list(row) == COLUMNS
        assert (row["rule"], row["n"], row["B"], row["F"]) == ("topk(k=2)", 2, 64, 32)
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["throughput"] > 0
        steps = row["measured"] == "steps"
        for name, there in (
            ("compile_s", steps),
            ("tokens_per_s", not steps),
            ("peak_mb", not steps),
        ):
            assert row[name] > 0 if there else row[name] is None
    assert rows[0]["throughput"] == rows[3]["throughput"] == 1
    assert rows[3]["peak_mb"] > rows[4]["peak_mb"]
    said = (tmp_path / "bench_ensemble.txt").read_text()
    assert said == capsys.readouterr().out
    first, *table = said.splitlines()
    assert f"jax {jax.__version__}" in first
    assert len(table) == 1 + len(rows)
    assert len({len(line) for line in table}) == 1, "the table is aligned"


def test_rows_say_what_turns_found():
    turns = Turns(
        "tokens",
        batch=64,
        width=8,
        steps=4,
        seconds={"processes": [1.0, 20.0, 21.0], "side by side": [9.0, 10.0, 7.0]},
        peak_mb={"processes": 40.4, "side by side": 30.6},
    )
    first, second = _bench_turns.rows({"rule": "r", "n": 2, "F": 16}, turns)
    assert list(first) == list(second) == COLUMNS
    values = ["r", 2, 16, "tokens", "processes", 64, 8, 5000, 250, 5250, 1.0]
    assert list(first.values()) == [*values, None, 13, 40]
    # Within rounds 1/9, 2 and 3; of medians it would be 20/9.
    values = ["r", 2, 16, "tokens", "side by side", 64, 8, 2250, 1750, 2500, 2.0]
    assert list(second.values()) == [*values, None, 28, 31]


def test_steps_have_no_tokens_and_compile():
    turns = Turns("steps", 64, 8, 1, {"alone": [0.5]}, compile_s={"alone": 1.234})
    [row] = _bench_turns.rows({}, turns)
    assert (row["ms"], row["compile_s"]) == (500, 1.23)
    assert row["tokens_per_s"] is row["peak_mb"] is None


def test_one_alone_takes_the_steps_of_all(monkeypatch):
    took = []

    class Counted:
        def __init__(self, groups, batches):
            [group] = groups
            self.what = len(group.names), group.ensemble.at_once
            self.compile_s = float(len(took))
            assert next(batches)["x"].shape == (64, 8)

        def __call__(self, n):
            took.append((*self.what, n))
            return float(n)

    monkeypatch.setattr(bench_ensemble, "Steps", Counted)
    turns = bench_ensemble.steps_alone(configured(seeds="0,1,2", rounds="2"))
    alone, one, all_ = (1, 1), (3, 1), (3, 3)
    assert took == [
        *((*what, 1) for what in (alone, one, all_)),
        *((*alone, 6), (*one, 2), (*all_, 2)),
        *((*one, 2), (*all_, 2), (*alone, 6)),
    ]
    assert turns.seconds == {
        "alone": [6, 6],
        "1 at once": [2, 2],
        "3 at once": [2, 2],
    }


def test_programs_that_were_kept_are_not_used():
    def program():
        jax.jit(lambda x: x * 1.2345).lower(1.0).compile()

    hits = []

    def listener(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    program()
    jax.monitoring.register_event_listener(listener)
    try:
        with bench_ensemble.compiled_anew():
            program()
        assert hits == []
        program()
        assert len(hits) == 1
    finally:
        jax.monitoring.unregister_event_listener(listener)


# Turns


def test_another_begins_each_round():
    order = []

    def turn(name):
        return lambda: order.append(name) or float(len(order))

    seconds = taken({name: turn(name) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"
    assert seconds == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_processes_take_a_turn_at_the_same_time(monkeypatch):
    """Each waits for all others, which one after another would never end."""
    met = threading.Barrier(3, timeout=60)
    monkeypatch.setattr(Worker, "step", lambda worker: met.wait())
    assert until_the_last([Worker.__new__(Worker) for _ in range(3)]) > 0


@dataclass
class Task:
    dies: str


def test_a_process_that_dies_ends_the_benchmark():
    never = Task("never")
    with ExitStack() as stack:
        fine = started(stack, CHILD, [never, never])
        until_the_last(fine)
        assert [worker.peak_mb for worker in fine] == [2, 2]
    assert [worker._process.returncode for worker in fine] == [0, 0]
    with (
        pytest.raises(ChildProcessError, match="bench_child` ended with status 3"),
        ExitStack() as stack,
    ):
        started(stack, CHILD, [never, Task("at once")])
    with (
        pytest.raises(ChildProcessError, match="bench_child` ended with status 4"),
        ExitStack() as stack,
    ):
        until_the_last(started(stack, CHILD, [Task("in a turn"), never]))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"rounds": "0"}, "--rounds must be at least 1"),
        ({"seeds": "3"}, "--seeds: give two or more, each once"),
        ({"seeds": "3,3"}, "--seeds: give two or more, each once"),
        ({"rules": ""}, "--rules: nothing would be timed"),
        ({"rules": "topk(k=33)"}, "--rules: topk: k=33 must be above 0 and at most"),
        ({"buffer": "64"}, "--buffer=64 must be a multiple of twice the batch"),
        ({"site": "resid_post.9"}, "resid_post.9"),
    ],
)
def test_what_cannot_be_timed_is_said(given, fault):
    _, faults = settings.build(bench_ensemble.Config(), {**TINY, **given})
    assert [text for text in faults if fault in text], faults
