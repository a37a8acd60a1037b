"""Recorded runs of the authors' code, through the package."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import parity
from tests.float32_sums import torch_sum

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def test_there_are_recordings_of_every_rule_the_authors_have():
    assert {parity.read(path)[0]["rule"] for path in GOLDEN} == set(parity.RULES)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_replay_of_the_authors_code(path, x64):
    config, arrays = parity.read(path)
    assert parity.refusal(config, arrays) is None
    rows = parity.replay(path)
    assert not [row for row in rows if not row.passes]
    compared = {row.quantity.removesuffix(" (float64)") for row in rows}
    recorded = {n for n in arrays if n.startswith(("step0/", "traj/", "final/"))}
    assert recorded - compared == set(parity.unreplayable(config))
    reported = {"loss", "loss_mse", f"loss_{parity.L1_TERM.get(config['rule'], 'aux')}"}
    assert {f"metrics/{name}" for name in reported} <= compared


def changed(tmp_path, change):
    """A copy of one recording with something wrong in it."""
    with np.load(GOLDEN[0]) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(tmp_path / "wrong.npz", **arrays)
    return tmp_path / "wrong.npz"


WRONG = {
    "a gradient": lambda a: a["step0/grad/W_enc"].__setitem__((3, 3), 1e-4),
    "one final weight": lambda a: a["final/W_dec"].__setitem__((0, 0), 0.1),
    "a loss by a millionth": lambda a: a["traj/loss"].__imul__(1 + 1e-6),
    "a NaN on one side": lambda a: a["traj/aux_loss"].__setitem__(3, np.nan),
    "an initial weight": lambda a: a["init/W_dec"].__imul__(1.001),
    "a batch": lambda a: a["x"].__setitem__((9, 0), 0.0),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recording_fails(what, tmp_path, x64):
    rows = parity.replay(changed(tmp_path, WRONG[what]))
    assert [row for row in rows if not row.passes]


def test_a_step_that_reports_another_loss_than_it_has_fails(monkeypatch, x64):
    def make_step(*args, **kwargs):
        step = parity_make_step(*args, **kwargs)

        def wrong(state, batch):
            state, metrics = step(state, batch)
            return state, {**metrics, "loss_mse": metrics["loss_mse"] * (1 + 1e-6)}

        return wrong

    parity_make_step = parity.make_step
    monkeypatch.setattr(parity, "make_step", make_step)
    rows = parity.trajectory(*parity.read(GOLDEN[0]))
    assert [row.quantity for row in rows if not row.passes] == ["metrics/loss_mse"]


# Where n numbers are zero but for 2^24 and two ones, the order decides: a one alone is
# lost next to 2^24, two together are not. (n, where 2^24 is, the ones, what is kept.)
ORDERS = {
    "one accumulator, vector by vector": (96, 0, (32, 64), 0),
    "another accumulator, same lane": (96, 0, (8, 40), 2),
    "leftover vectors go to the first": (48, 0, (8, 40), 0),
    "leftover vectors go there before the others": (40, 8, (0, 32), 2),
    "accumulators before lanes": (64, 0, (1, 9), 2),
    "lanes in turn": (64, 0, (2, 3), 0),
    "lanes in turn, from the first": (64, 7, (0, 6), 2),
    "the tail by itself": (66, 0, (64, 65), 2),
    "to the tail, the lanes": (65, 64, (0, 1), 0),
    "levels of 16": (576, 0, (512, 544), 2),
    "below 16 no level": (512, 0, (448, 480), 0),
    "single numbers, no lanes": (7, 1, (0, 4), 2),
}


@pytest.mark.parametrize("case", ORDERS)
def test_torch_sum_adds_in_the_order_that_it_states(case):
    n, large, ones, kept = ORDERS[case]
    x = np.zeros(n, np.float32)
    x[large], x[list(ones)] = 2**24, 1
    assert torch_sum(x) - np.float32(2**24) == kept
    np.testing.assert_array_equal(torch_sum(np.stack([x, 0 * x])), [2**24 + kept, 0])


# 1 + 1/2 + ... + 1/n in float32, by torch.sum of release 2.13 on a CPU.
HARMONIC = {
    7: 2.5928571224212646,
    24: 3.77595853805542,
    96: 5.146762847900391,
    384: 6.5291595458984375,
    1000: 7.485470771789551,
    8192: 9.588190078735352,
    30000: 10.886185646057129,
}


@pytest.mark.parametrize("n", HARMONIC)
def test_torch_sum_is_that_of_torch(n):
    x = np.float32(1) / np.arange(1, n + 1, dtype=np.float32)
    assert torch_sum(x) == HARMONIC[n]
    assert np.cumsum(x)[-1] != HARMONIC[n]  # one after the other


def test_what_cannot_be_replayed_fails_with_its_reason(tmp_path, capsys, x64):
    with np.load(GOLDEN[0]) as file:
        arrays = dict(file)
    arrays["config"] = np.array(str(arrays["config"]).replace('"batchtopk"', '"other"'))
    np.savez(tmp_path / "other.npz", **arrays)
    assert parity.main(str(tmp_path)) == 1
    assert "NOT REPLAYED: its rule 'other' is none of" in capsys.readouterr().out


def test_the_command_prints_every_quantity_and_succeeds(tmp_path, capsys, x64):
    shutil.copy(GOLDEN[0], tmp_path)
    assert parity.main(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "step0/grad/W_dec (float64)" in out
    assert "step0/sae_out (float32)" in out
    assert "final/W_dec" in out
    assert "1 files, 0 failures" in out
