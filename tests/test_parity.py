"""Recorded runs of the authors' code, through the package."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import parity

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
