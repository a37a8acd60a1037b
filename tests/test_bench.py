"""The benchmark of training steps: what it leaves, and its pure parts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from experiments import _bench_data, _bench_ours, _bench_timing, bench
from experiments._bench_timing import FLOOR, OURS, Timed
from sae_jax import settings
from tests.conftest import USER_RULES

COLUMNS = (
    "rule B D F k pieces ms ms_min ms_max peer ratio_to_peer ratio_to_encoder_matmul "
    "peak_mb peer_peak_mb peer_ms compile_s"
).split()
DENSE = "experiments._bench_dense_top_afa"


def configured(**given: str) -> bench.Config:
    config, faults = settings.build(bench.Config(), given)
    assert faults == []
    return config


def test_it_leaves_rows_and_a_figure(tmp_path, capsys):
    rows = bench.run(
        configured(
            out=str(tmp_path),
            sizes="24x8x32",
            ks="3",
            rules="topk,toy_soft_shrink(amount=0.2)",
            rule_files=str(USER_RULES),
            peers="",
            rounds="2",
        )
    )
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["rows"] == rows
    assert [(row["rule"], row["k"]) for row in rows] == [
        ("topk", 3),
        ("toy_soft_shrink", None),
    ]
    for row in rows:
        assert list(row) == COLUMNS
        assert (row["B"], row["D"], row["F"]) == (24, 8, 32)
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["ratio_to_encoder_matmul"] > 0
        assert row["compile_s"] > 0
        assert row["peak_mb"] > 0
        for name in ("peer", "ratio_to_peer", "peer_peak_mb", "peer_ms"):
            assert row[name] is None
    assert report["versions"]["jax"] == jax.__version__
    assert report["machine"]["cores"] >= report["machine"]["threads"] >= 1
    assert "--sizes=24x8x32" in report["command"]
    assert "--dtype" not in report["command"], "it has its default"
    said = capsys.readouterr().out.splitlines()
    assert len({len(text) for text in said}) == 1, "the table is aligned"
    assert len(said) == 3
    assert (tmp_path / "bench.png").stat().st_size > 5000


@pytest.mark.parametrize("rule", ["topk", "gradient_topk(beta=0.0)"])
def test_the_first_loss_is_that_of_the_given_rows_and_weights(tmp_path, rule):
    config = configured(
        out=str(tmp_path), sizes="24x8x32", ks="3", rules=rule, peers="", rounds="1"
    )
    bench.run(config)
    report = json.loads((tmp_path / "bench.json").read_text())
    _bench_data.write(tmp_path, 24, 8, 32)
    x, W_dec = np.load(tmp_path / "x.npy")[0], np.load(tmp_path / "W_dec.npy")
    pre = x @ W_dec.T
    kept = pre >= np.sort(pre, axis=1)[:, [-3]]
    expected = np.square(np.maximum(pre, 0) * kept @ W_dec - x).mean()
    (found,) = report["first_mse"].values()
    assert found == {OURS: pytest.approx(expected, rel=1e-5)}


def test_a_missing_environment_stops_it_at_once(tmp_path):
    given = {"peers": "saelens", "saelens_python": "/no/python"}
    config = configured(out=str(tmp_path / "out"), **given)
    with pytest.raises(FileNotFoundError, match=r"saelens.*`make bench` builds it"):
        bench.run(config)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_fails_ends_it(tmp_path):
    missing = (bench.sys.executable, "experiments._bench_nothing")
    task = bench.task(bench.cases(configured())[0], configured(), str(tmp_path))
    with pytest.raises(ChildProcessError, match="_bench_nothing` ended with status 1"):
        _bench_timing.measure({OURS: missing}, task, 1, 1.0, {})


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"sizes": "64x32"}, "--sizes: '64x32' is not rows x width x features"),
        ({"sizes": "64x0x8"}, "--sizes: '64x0x8' is not rows x width x features"),
        ({"rounds": "0"}, "--rounds: nothing would be timed"),
        ({"sizes": "64x32x16"}, "--rules: topk: k=32 must be above 0 and at most"),
    ],
)
def test_what_cannot_be_timed_is_said(given, fault):
    _, faults = settings.build(bench.Config(), {"rules": "topk", **given})
    assert any(text.startswith(fault) for text in faults), faults


def test_every_rule_is_timed():
    config = configured(sizes="8x768x256,4x768x256", ks="3,5")
    found = [(c.bound.rule.name, c.k, c.size) for c in bench.cases(config)]
    for name in sae_jax.RULES:
        rule = sae_jax.RULES[name]
        ks = [3, 5] if rule.budget else [None]
        both = [(name, k, (rows, 768, 256)) for rows in (8, 4) for k in ks]
        assert [case for case in found if case[0] == name] == both
    assert len(set(found)) == len(found)


def test_dense_rules_alone_take_batches_in_pieces():
    def pieces(**given):
        config = configured(sizes="1000x16x256,96x16x256", ks="3", **given)
        return {(c.bound.rule.name, c.size[0]): c.pieces for c in bench.cases(config)}

    found = pieces(rows_at_once="100")
    assert found["relu", 1000] == 10
    assert found["gated", 96] == 1
    assert found["topk", 1000] == 1
    assert pieces(rows_at_once="300")["jump_relu", 1000] == 4
    assert set(pieces(rows_at_once="0").values()) == {1}


def test_every_peer_is_that_of_a_rule_we_have():
    assert set(bench.PEERS) <= set(sae_jax.RULES)
    config = configured(rules="topk,toy_soft_shrink", sizes="8x16x256")
    topk, _, toy = bench.cases(config)
    pythons = dict.fromkeys(config.peers, "python")
    assert list(bench.workers(topk, config, pythons)) == [
        OURS,
        "sparsify",
        "saelens",
        FLOOR,
    ]
    assert list(bench.workers(toy, config, pythons)) == [OURS, FLOOR]
    alone = configured(peers="saelens")
    assert list(bench.workers(topk, alone, pythons)) == [OURS, "saelens", FLOOR]


# Ratios


def test_ratios_are_taken_within_rounds():
    # The machine is ten times slower in the last rounds; the ratio is 2 in each.
    ours, theirs = [2.0, 4.0, 20.0, 40.0, 60.0], [1.0, 2.0, 10.0, 20.0, 30.0]
    assert _bench_timing.within_rounds(ours, theirs) == 2
    # Of medians it would be 20 / 9.
    assert _bench_timing.within_rounds([1.0, 20.0, 21.0], [9.0, 10.0, 7.0]) == 2
    with pytest.raises(ValueError, match="zip"):
        _bench_timing.within_rounds([1.0], [1.0, 2.0])


def test_a_row_says_what_was_measured():
    timed = Timed(
        seconds={OURS: [0.2, 0.1, 0.4], "p": [0.4, 0.4, 0.4], FLOOR: [0.1, 0.1, 0.1]},
        peak_mb={OURS: 10.4, "p": 20.6, FLOOR: 1.0},
        first_mse={},
        compile_s=1.234,
        versions={},
        device="cpu",
    )
    (row,) = _bench_timing.in_rows(
        dict(zip(COLUMNS, ["r", 1, 2, 3, 4, 5], strict=False)), timed
    )
    values = ["r", 1, 2, 3, 4, 5, 200, 100, 400, "p", 0.5, 2, 10, 21, 400, 1.23]
    assert row == dict(zip(COLUMNS, values, strict=True))


def test_systems_take_turns_in_being_first():
    orders = [_bench_timing.in_turn(list("abc"), i) for i in range(4)]
    assert list(map("".join, orders)) == ["abc", "bca", "cab", "abc"]


# Data


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        _bench_data.write(folder, 16, 8, 32)
    for name, shape in {"x.npy": (4, 16, 8), "W_dec.npy": (32, 8)}.items():
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        array = np.load(folders[0] / name)
        assert array.shape == shape
        assert array.dtype == np.float32
    other = _bench_data.planted(1, 64, 8, 32)
    assert not np.array_equal(other, _bench_data.planted(0, 64, 8, 32))
    np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, rtol=1e-6)


def test_directions_come_by_zipfs_law():
    drawn = _bench_data.ranks(np.random.default_rng(0), (200_000,), 1000)
    counts = np.bincount(drawn, minlength=1000)
    assert len(counts) == 1000
    expected = np.arange(1, 1001) ** -0.7
    expected *= 200_000 / expected.sum()
    # Each count is within five standard deviations of a Poisson variable.
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


def test_rows_are_sums_of_known_directions():
    x = _bench_data.planted(0, 4000, 64, 500)
    directions = _bench_data.unit_rows(2, 500, 64)
    along = x @ directions.T
    hot, cold = along[:, 0], along[:, -1]
    # The hottest comes 40 / sum(r^-0.7) = 2.2 times a row, the coldest 0.03 times.
    assert hot.mean() == pytest.approx(2.2, abs=0.5)
    assert abs(cold.mean()) < 0.5
    # Squared lengths: 40 strengths with a mean square of 2, and the hot ones again.
    assert 80 < np.square(x).sum(1).mean() < 120


# Ours, and the dense baseline


def test_our_worker_starts_from_the_given_weights():
    W_dec = _bench_data.unit_rows(1, 32, 8)
    for spec in ("relu", "gated", "toy_tied(amount=0.0)"):
        sae = sae_jax.SAE(8, 32, spec)
        variables = _bench_ours.started(sae, sae_jax.Recipe(), W_dec).variables
        np.testing.assert_array_equal(variables.params["W_dec"], W_dec)
        assert set(variables.params) == set(sae.shapes().params)
        codes = sae_jax.to_dense(sae.encode(variables, jnp.eye(8)))
        np.testing.assert_allclose(codes, np.maximum(W_dec.T, 0), atol=1e-6)


@pytest.fixture
def both():
    """Loss, mask and gradients of Top-AFA by us and by the dense baseline."""
    torch = pytest.importorskip("torch")
    dense = pytest.importorskip(DENSE)
    x = _bench_data.planted(0, 24, 8, 40)
    W_dec = _bench_data.unit_rows(1, 40, 8) * np.linspace(0.7, 1.4, 40)[:, None]
    b_dec = np.linspace(-0.2, 0.3, 8)
    W_dec, b_dec = W_dec.astype(np.float32), b_dec.astype(np.float32)
    coef = 0.125

    sae = sae_jax.SAE(8, 40, f"top_afa(coef={coef})")
    state = _bench_ours.started(sae, sae_jax.Recipe(), W_dec)
    params = {**state.variables.params, "b_dec": jnp.asarray(b_dec)}
    variables = state.variables._replace(params=params)
    codes = sae_jax.to_dense(sae.encode(variables, jnp.asarray(x)))
    descent = optax.sgd(1.0)  # whose update is the gradient
    step = sae_jax.make_step(sae, descent, aux=None, decoder_norm="free", jit=False)
    key = jax.random.key(0)
    state = sae_jax.init_state(sae, descent, key, variables=variables)
    after, metrics = step(state, {"x": jnp.asarray(x)})
    grads = jax.tree.map(jnp.subtract, params, after.variables.params)

    model = dense.DenseTopAFA(torch.from_numpy(W_dec))
    model.b_dec.data = torch.from_numpy(b_dec)
    theirs = model(torch.from_numpy(x), coef)
    theirs.loss.backward()
    return (metrics, codes, grads), theirs, model


def test_the_dense_baseline_computes_what_our_rule_does(both):
    (metrics, codes, grads), theirs, model = both
    kept = np.asarray(codes) > 0
    assert 0 < kept.sum() < 0.9 * kept.size
    # Where a strength is 0, keeping it or not is the same.
    np.testing.assert_array_equal(theirs.kept.numpy() > 0, kept)
    found = [float(theirs.loss.detach()), float(theirs.mse.detach())]
    ours = [float(metrics["loss"]), float(metrics["loss_mse"])]
    np.testing.assert_allclose(found, ours, rtol=1e-6)
    for name in ("W_dec", "b_dec"):
        found = getattr(model, name).grad.numpy()
        np.testing.assert_allclose(found, grads[name], rtol=1e-4, atol=1e-5)
    found, ours = model.W_enc.grad.numpy().T, np.asarray(grads["W_enc"])
    np.testing.assert_allclose(found, ours, rtol=1e-4, atol=1e-5)
    assert model.b_enc.grad is None


def test_the_dense_baseline_keeps_what_the_authors_example_keeps():
    torch = pytest.importorskip("torch")
    a = torch.tensor([[5.0, 4, 3], [1, 1, 1], [1, 10, 2]])
    W_dec = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    kept = pytest.importorskip(DENSE).nearest(a, W_dec, a @ W_dec)
    # All three would be nearer, which their last sum of 1e8 forbids.
    np.testing.assert_array_equal(a * kept, [[0, 4, 3], [0, 1, 1], [0, 10, 2]])


def test_the_dense_baseline_holds_rows_at_norm_1(both):
    _, _, model = both
    dense = pytest.importorskip(DENSE)
    before = model.W_dec.detach().clone()
    dense.constrain(model)
    rows = model.W_dec.detach()
    np.testing.assert_allclose(rows.norm(dim=1), 1, rtol=1e-6)
    unit = before / before.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(rows, unit, rtol=1e-6)
    along = (model.W_dec.grad * rows).sum(dim=1)
    np.testing.assert_allclose(along, 0, atol=1e-5)


def test_workers_read_the_task_as_it_was_written(monkeypatch):
    config = configured(rules="matryoshka(prefixes=[0.5,1.0])", threads="1")
    task = bench.task(bench.cases(config)[0], config, "folder")
    text = json.dumps(bench.asdict(task))
    monkeypatch.setattr("sys.argv", ["worker", text])
    read = _bench_ours.task_given()
    assert read.values["prefixes"] == [0.5, 1.0]
    assert sae_jax.parse(read.spec).hp == dict(task.values)
    assert read.threads == 1
    assert Path(read.folder) == Path("folder")
