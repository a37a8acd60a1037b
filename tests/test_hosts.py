"""Real processes on this machine train one SAE together, die together, and go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import sae_jax
from sae_jax.run import hosts
from tests.hosts_child import STEPS

ROOT = Path(__file__).parents[1]
MEMBERS = ("jump", "weak", "weaker")


def started(*command, seconds=240):
    """Runs to its end; its status and what it says."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return done.returncode, done.stdout + done.stderr


def job(n, folder, mesh, *trouble):
    return started("-m", "tests.hosts_child", n, folder, mesh, *trouble)


def left(folder, members=MEMBERS):
    arrays = {m: load_file(folder / "saes" / m / "sae.safetensors") for m in members}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return arrays, [json.loads(line) for line in lines]


def check_same(found, expected):
    for member, arrays in expected[0].items():
        for name, array in arrays.items():
            np.testing.assert_allclose(found[0][member][name], array, 1e-3, 1e-4)
    assert len(found[1]) == len(expected[1]) > 0
    for line, other in zip(found[1], expected[1], strict=True):
        assert line.keys() == other.keys()
        for key, value in other.items():
            if not isinstance(value, str):
                value = pytest.approx(value, rel=1e-3, abs=1e-5)
            assert line[key] == value, key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    status, said = job(1, folder, "data:1")
    assert status == 0, said
    return left(folder)


def test_two_processes_then_four_then_two_train_what_one_does(alone, tmp_path):
    folder = tmp_path / "run"

    # One of two dies: the job ends, and it is said who died, and how.
    status, said = job(2, folder, "data:2", "SIGKILL", 1, 6)
    assert status == 1
    assert "process 1 of 2 was killed by SIGKILL, and the job with it" in said
    assert not (folder / "saes").exists()

    # One of four is told to end: all save the same step, later than that one.
    status, said = job(4, folder, "data:4", "SIGTERM", 2, 7)
    assert status == 75, said
    [told] = [line for line in said.splitlines() if "steps are safe" in line]
    steps = int(told.split()[1])
    assert 7 <= steps < STEPS
    assert "The same command goes on" in told
    assert str(steps) in os.listdir(folder / "checkpoints")

    # Features over processes: each has all rows.
    status, said = job(2, folder, "data:1,feature:2")
    assert status == 0, said
    check_same(left(folder), alone)
    starts = (folder / "environment.jsonl").read_text().splitlines()
    assert len(starts) == 3, "the first process writes for all"


def test_members_spread_over_processes(alone, tmp_path):
    """No number of one is on the other's device, and all are read and saved."""
    folder = tmp_path / "run"
    status, said = job(2, folder, "member:2")
    assert status == 0, said
    spread = "weak", "weaker"
    lines = [line for line in alone[1] if line["sae"] in spread]
    check_same(left(folder, spread), ({m: alone[0][m] for m in spread}, lines))


def test_who_finds_no_others_does_not_go_on_alone():
    code = (
        "from sae_jax.run import hosts; hosts.TO_JOIN = 3; "
        "hosts.join('localhost:1', 2, 1); print('alone')"
    )
    status, said = started("-c", code)
    assert status not in (0, None)
    assert "process 1: looking for localhost:1" in said
    assert "alone" not in said.splitlines()


def test_slurm_says_who_is_who():
    """Its variables, as they are on one host with two tasks."""
    code = (
        "from sae_jax.run import hosts; hosts.join(); import jax; print(*{}, sep='/')"
    )
    code = code.format("(jax.process_index(), jax.process_count())")
    tasks = []
    for i in range(2):
        slurm = {
            "SLURM_JOB_ID": f"{os.getpid()}",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": f"{i}",
            "SLURM_LOCALID": f"{i}",
        }
        tasks.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONPATH": str(ROOT), **slurm},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [task.communicate(timeout=120)[0].split()[-1] for task in tasks]
    assert said == ["0/2", "1/2"]


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (("localhost:1", 0, -1), "go together"),
        (("", 2, 0), "go together"),
        (("localhost:1", 2, 2), "--process=2 is not below --processes=2"),
        (("", 0, -1), "finds no TPU pod, SLURM or MPI in the environment"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place, error, monkeypatch):
    def finds_nothing(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", finds_nothing)
    with pytest.raises(ValueError, match=error):
        hosts.join(*place)


def test_alone_nothing_changes():
    assert hosts.first()
    assert not hosts.several()
    assert hosts.all_agree(True)
    assert not hosts.all_agree(False)
    assert hosts.whole_position({"a": 1}) == {"a": 1}
    assert not hosts.told_to_end(3)
    hosts.wait_for_all("anywhere")
    assert sae_jax.mesh is not None


LAUNCH = """
launch.py --experiment=train --site=resid_post.1 --rule=topk(k=8) --context=64
--config.sae.expansion=4 --config.data.batch=64 --config.data.buffer=512
--config.data.readers=4 --config.data.contexts_per_pass=4 --config.train.steps=20
--config.train.warmup=5 --config.every.log=5 --config.report.browse=0
--config.evaluation.contexts=4
""".split()


@pytest.mark.slow
def test_processes_that_read_the_language_model_train_what_one_does(tmp_path):
    runs = {}
    for n in (1, 2, 4):
        runs[n] = tmp_path / f"{n}"
        more = [f"--local_processes={n}"] if n > 1 else []
        status, said = started(*LAUNCH, f"--out={runs[n]}", *more, seconds=600)
        assert status == 0, said
        assert said.count("loss recovered") == 1, "the first process speaks for all"
    one = {"topk-k8": load_file(runs[1] / "saes" / "topk-k8" / "sae.safetensors")}
    for n in (2, 4):
        found = load_file(runs[n] / "saes" / "topk-k8" / "sae.safetensors")
        for name, array in one["topk-k8"].items():
            np.testing.assert_allclose(found[name], array, 1e-3, 1e-4)
        files = {path.name for path in runs[n].iterdir()}
        assert files == {path.name for path in runs[1].iterdir()}
