"""The scripts for pods: syntax, quoting, and what they call in which order.

`gcloud` and all else that would leave the machine are stubs that record their
arguments. No script was ever run on a pod.
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import pod
from experiments.pod import Config
from sae_jax import settings

HOSTILE = "a b'c\"d$(touch HACKED)`touch HACKED`; touch HACKED\\ $HOME *\n-x"
PLAIN = Config(
    project="my-project",
    zone="us-west4-a",
    repository="https://example.org/sae_jax",
    share="10.0.0.2:/runs",
    arguments="--experiment=train --rule='topk(k=64)' --mesh=data:8,feature:4 "
    "--out=/mnt/runs/a",
)
WRONG = dataclasses.replace(
    PLAIN,
    **dict.fromkeys(
        "project zone repository share accelerator_type runtime_version".split(),
        HOSTILE,
    ),
    revision=HOSTILE,
    mount="/" + HOSTILE,
    arguments=shlex.join([f"--rule={HOSTILE}", f"--out=/{HOSTILE}/a"]),
    slurm=pod.Slurm(checkout=HOSTILE),
)
BOTH = pytest.mark.parametrize("config", [PLAIN, WRONG], ids=["plain", "hostile"])

# Each call: how many words, then the words, ended by NUL. What it answers stands in a
# file of its name, a line for each call: `status text`.
STUB = """#!/usr/bin/env bash
name=$(basename "$0")
{ printf '%s\\0' "$(($# + 1))" "$name"; printf '%s\\0' "$@"; } >>"$STUBS/calls"
case "$name $*" in
  "gcloud "*describe*) answers=$STUBS/states ;;
  *) answers=$STUBS/$name ;;
esac
[ -s "$answers" ] || exit 0
read -r status text <"$answers"
sed -i 1d "$answers"
if [ "$text" = NOT_FOUND ]; then echo "NOT_FOUND: no such thing" >&2
elif [ -n "$text" ]; then echo "$text"; fi
exit "$status"
"""


@pytest.fixture
def machine(tmp_path):
    """Runs scripts where everything that would leave it is a stub."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, root: Path):
        self.stubs, self.home = root / "stubs", root / "home"
        self.stubs.mkdir()
        self.home.mkdir()
        for name in "gcloud sleep srun scontrol sudo mountpoint git make".split():
            self.stub(self.stubs / name)

    def stub(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        path = f"{self.stubs}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "STUBS": str(self.stubs / "log")}
        (self.stubs / "log").mkdir(exist_ok=True)
        return subprocess.run(
            command, cwd=self.home, env=env, capture_output=True, text=True, timeout=60
        )

    def says(self, name: str, *lines: str) -> None:
        (self.stubs / "log").mkdir(exist_ok=True)
        text = "".join(f"{line}\n" for line in lines)
        (self.stubs / "log" / name).write_text(text)

    @property
    def calls(self) -> list[list[str]]:
        words = (self.stubs / "log" / "calls").read_text().split("\0")[:-1]
        found = []
        while words:
            n = int(words[0])
            found.append(words[1 : n + 1])
            words = words[n + 1 :]
        return found

    @property
    def unharmed(self) -> bool:
        return not list(self.home.parent.rglob("HACKED*"))


def written(config: Config, folder: Path) -> Path:
    pod.run(dataclasses.replace(config, out=str(folder)))
    return folder


def remote(config: Config, name: str, machine: Machine, folder: Path) -> str:
    """The command that all hosts are given."""
    done = machine.run(str(written(config, folder) / name))
    assert done.returncode == 0, done.stderr
    (call,) = machine.calls
    where = [f"--zone={config.zone}", f"--project={config.project}"]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "sae", *where, "--worker=all"]
    assert call[:-1] == ssh
    (machine.stubs / "log" / "calls").unlink()
    return call[-1].removeprefix("--command=")


# Syntax


@BOTH
def test_all_is_written_and_is_bash(config, machine, tmp_path):
    texts = pod.texts(config)
    folder = written(config, tmp_path / "out")
    assert {p.name for p in folder.iterdir()} == texts.keys()
    hosts = [remote(config, n, machine, folder) for n in ("set_up.sh", "launch.sh")]
    for text in [*texts.values(), *hosts]:
        checked = subprocess.run(["bash", "-n"], input=text, text=True, check=False)
        assert checked.returncode == 0, text
        assert "set -euo pipefail" in text
        if shutil.which("shellcheck"):
            subprocess.run(
                ["shellcheck", "--shell=bash", "-"], input=text, text=True, check=True
            )
    assert all(os.access(folder / name, os.X_OK) for name in texts)
    assert machine.unharmed


# What is called


@BOTH
def test_a_slice_is_asked_for_waited_for_and_given_back(config, machine, tmp_path):
    machine.says("states", "0 WAITING_FOR_RESOURCES", "1 broken", "0 ACTIVE")
    folder = written(config, tmp_path / "out")
    for name in ("create.sh", "delete.sh"):
        done = machine.run(str(folder / name))
        assert done.returncode == 0, done.stderr
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    where = [f"--zone={config.zone}", f"--project={config.project}"]
    gcloud = [call for call in machine.calls if "describe" not in call]
    assert gcloud[0] == [
        *(*queued, "create", "sae", "--node-id=sae", *where),
        f"--accelerator-type={config.accelerator_type}",
        f"--runtime-version={config.runtime_version}",
        "--spot",
    ]
    assert gcloud[-1] == [*queued, "delete", "sae", *where, "--force", "--quiet"]
    assert machine.unharmed


def test_a_slice_that_is_paid_for_in_full(machine, tmp_path):
    machine.says("states", "0 ACTIVE")
    full = dataclasses.replace(PLAIN, spot=False)
    machine.run(str(written(full, tmp_path / "out") / "create.sh"))
    assert "--spot" not in machine.calls[0]


def test_a_request_that_is_not_granted_ends_the_waiting(machine, tmp_path):
    machine.says("states", "0 PROVISIONING", "0 FAILED", "0 FAILED")
    done = machine.run(str(written(PLAIN, tmp_path / "out") / "create.sh"))
    assert done.returncode == 1
    assert "not granted" in done.stderr


@BOTH
def test_hosts_mount_clone_and_install(config, machine, tmp_path):
    command = remote(config, "set_up.sh", machine, tmp_path / "out")
    machine.says("mountpoint", "1")  # not mounted yet
    python = machine.home / "sae_jax" / ".venv" / "bin" / "python"
    machine.stub(python)  # as if cloned
    done = machine.run("bash", "-c", command)
    assert done.returncode == 0, done.stderr
    calls = machine.calls
    assert ["sudo", "mkdir", "-p", config.mount] in calls
    assert ["sudo", "mount", "-t", "nfs", config.share, config.mount] in calls
    assert ["git", "fetch", "origin", config.revision] in calls
    assert ["make", "install", "PYTHON=python3.11"] in calls
    assert calls[-1][:4] == ["python", "-m", "pip", "install"]
    assert ".[tpu]" in calls[-1]
    assert machine.unharmed
    shutil.rmtree(python.parents[2])
    machine.run("bash", "-c", command)
    assert ["git", "clone", config.repository, "sae_jax"] in machine.calls


@BOTH
def test_hosts_start_the_same_command(config, machine, tmp_path):
    command = remote(config, "launch.sh", machine, tmp_path / "out")
    machine.stub(machine.home / "sae_jax" / ".venv" / "bin" / "python")
    machine.says("python", "75")
    done = machine.run("bash", "-c", command)
    assert done.returncode == 75, done.stderr
    wanted = ["python", "launch.py", "--distributed", *shlex.split(config.arguments)]
    assert machine.calls[-1] == wanted
    assert machine.unharmed


def test_nothing_starts_where_the_shared_folder_is_not(machine, tmp_path):
    command = remote(PLAIN, "launch.sh", machine, tmp_path / "out")
    machine.stub(machine.home / "sae_jax" / ".venv" / "bin" / "python")
    machine.says("mountpoint", "32")
    assert machine.run("bash", "-c", command).returncode == 32
    assert [call[0] for call in machine.calls] == ["mountpoint"]


def test_a_process_that_was_left_behind_is_stopped_first(machine, tmp_path):
    """It holds the lock until it ends, which it does when it is told to."""
    command = remote(PLAIN, "launch.sh", machine, tmp_path / "out")
    folder = machine.home / "sae_jax"
    machine.stub(folder / ".venv" / "bin" / "python")
    left = subprocess.Popen(
        ["flock", ".launch.lock", "-c", "echo there; exec cat"],
        **{"cwd": folder, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
    )
    assert left.stdout is not None
    assert left.stdout.readline() == b"there\n"
    children = f"/proc/{left.pid}/task/{left.pid}/children"
    pid = Path(children).read_text().split()[0]
    (folder / ".launch.pid").write_text(pid)
    try:
        assert machine.run("bash", "-c", command).returncode == 0
        assert machine.calls[-1][:2] == ["python", "launch.py"]
    finally:
        left.communicate()


# Going on


def verbs(machine: Machine) -> list[str]:
    """What was done to the slice, in order."""
    words = {"create", "delete", "ssh"}
    found = [next((w for w in call if w in words), "") for call in machine.calls]
    return [verb for verb in found if verb]


def test_a_preempted_slice_is_made_again_and_the_command_goes_on(machine, tmp_path):
    machine.says(
        "states",
        *("1 NOT_FOUND", "0 ACTIVE"),  # none yet; made
        *("0 ACTIVE", "0 ACTIVE"),  # stopped with 75: goes on
        *("0 SUSPENDING", "0 SUSPENDING", "0 SUSPENDED"),  # the connection is lost
        *("1 NOT_FOUND", "0 ACTIVE", "0 ACTIVE"),  # taken away, made again
    )
    at = ["0", "0", "75", "0", "255", "0", "0", "0", "0"]
    machine.says("gcloud", *at)
    done = machine.run(str(written(PLAIN, tmp_path / "out") / "watch.sh"))
    assert done.returncode == 0, done.stderr
    both = ["ssh", "ssh"]  # set_up.sh and launch.sh
    assert verbs(machine) == ["create", *both, *both, "delete", "create", *both]


def test_a_command_that_fails_on_a_slice_that_is_there_is_given_up(machine, tmp_path):
    machine.says("states", *["0 ACTIVE"] * 6)
    machine.says("gcloud", *["0", "3"] * 3)
    done = machine.run(str(written(PLAIN, tmp_path / "out") / "watch.sh"))
    assert done.returncode == 3
    assert verbs(machine) == ["ssh"] * 6
    assert "3 failures in a row" in done.stderr


def test_failures_count_anew_after_a_stop_that_was_asked_for(machine, tmp_path):
    machine.says("states", *["0 ACTIVE"] * 20)
    machine.says("gcloud", *"0 3 0 3 0 75 0 3 0 3 0 0".split())
    done = machine.run(str(written(PLAIN, tmp_path / "out") / "watch.sh"))
    assert done.returncode == 0, done.stderr
    assert verbs(machine) == ["ssh"] * 12


def test_a_request_that_is_refused_is_given_up(machine, tmp_path):
    machine.says("states", *["1 NOT_FOUND"] * 6)
    machine.says("gcloud", *["1"] * 3)
    done = machine.run(str(written(PLAIN, tmp_path / "out") / "watch.sh"))
    assert done.returncode == 1
    assert verbs(machine) == ["create"] * 3


# SLURM


@BOTH
@pytest.mark.parametrize(
    ("status", "again"), [(0, False), (75, True), (143, True), (1, False)]
)
def test_a_job_is_queued_again_when_it_was_stopped(
    config, status, again, machine, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (machine.home / config.slurm.checkout.strip("/")).mkdir(parents=True)
    checkout = config.slurm.checkout.strip("/")
    slurm = dataclasses.replace(config.slurm, checkout=checkout)
    config = dataclasses.replace(config, slurm=slurm)
    machine.says("srun", str(status))
    done = machine.run(str(written(config, tmp_path / "out") / "slurm.sh"))
    assert done.returncode == status, done.stderr
    wanted = ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "launch.py"]
    wanted += ["--distributed", *shlex.split(config.arguments)]
    requeue = [["scontrol", "requeue", "17"]] if again else []
    assert machine.calls == [wanted, *requeue]
    assert machine.unharmed


def test_what_slurm_reads_comes_before_the_first_command():
    text = pod.texts(PLAIN)["slurm.sh"]
    head = text[: text.index("set -euo")]
    assert re.findall(r"^#SBATCH (.*)", text, re.M) == [
        *("--job-name=sae", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8"),
        *("--time=24:00:00", "--signal=TERM@600", "--requeue", "--open-mode=append"),
    ]
    assert all(line.startswith("#") for line in head.splitlines())


# Settings


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"project": ""}, "--project is needed: of Google Cloud"),
        ({"name": "a b"}, "--name='a b' must be of a-z"),
        ({"mount": "runs"}, "--mount='runs' must begin with /"),
        ({"arguments": "--out='a"}, "cannot be read by a shell"),
        ({"arguments": "--out=runs/a"}, "must be given and be below mount=/mnt/runs"),
        ({"arguments": "--experiment=train"}, "must be given and be below"),
        ({"arguments": "--out=/mnt/runs/a --distributed"}, "leave it out"),
        ({"config.slurm.job": "a b"}, "--config.slurm.job='a b' must be of letters"),
        ({"config.slurm.time": "1 day"}, "is not [days-]hours"),
        ({"config.slurm.nodes": "0"}, "slurm.nodes must be at least 1"),
    ],
)
def test_what_cannot_be_written_is_said(given, fault):
    needed = "project zone repository share arguments".split()
    plain = {name: getattr(PLAIN, name) for name in needed}
    _, faults = settings.build(Config(), {**plain, **given})
    assert any(fault in text for text in faults), faults
    assert settings.build(Config(), plain)[1] == []


def test_the_command_of_the_document_is_understood():
    text = (Path(__file__).parent.parent / "experiments" / "PODS.md").read_text()
    command = re.search(r"```sh\n(.*?)\nruns/", text, re.S)[1].replace("\\\n", " ")
    words = [word.removeprefix("--") for word in shlex.split(command)[2:]]
    given = dict(word.split("=", 1) for word in words)
    assert given.pop("experiment") == "pod"
    config, faults = settings.build(Config(), given)
    assert faults == []
    assert "--mesh=data:16,feature:2" in pod.texts(config)["slurm.sh"]
