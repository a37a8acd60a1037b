"""The run's folder and what is logged there."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from sae_jax import load
from sae_jax.activations.in_memory import InMemory
from sae_jax.model import SAE
from sae_jax.run.folder import RunFolder, folder_fault
from sae_jax.run.in_folder import train_in_folder
from sae_jax.run.log import JsonLines, TensorBoard, Wandb, read_lines
from sae_jax.run.loop import Every
from sae_jax.run.members import Member
from sae_jax.run.stop import Stop
from sae_jax.training.recipe import Recipe

CONFIG = {"lr": 0.1, "data": {"batch": 4, "inner": {"seed": 0}}, "sites": ("a", "b")}


def opened(path, config=CONFIG):
    """As a run leaves it that has trained."""
    RunFolder(path, config).close()
    with (path / "metrics.jsonl").open("a") as file:
        file.write("{}\n")


def test_a_folder_in_which_nothing_was_trained_takes_other_settings(tmp_path):
    RunFolder(tmp_path, CONFIG).close()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    opened(tmp_path, {"lr": 0.2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.2}
    with pytest.raises(ValueError, match=r"lr was 0\.2 and is 0\.1"):
        opened(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    opened(tmp_path / "run")
    opened(tmp_path / "run", dict(reversed(CONFIG.items())))
    other = {"lr": 0.1, "data": {"batch": 8, "inner": {"seed": 1}}, "sites": ("a", "b")}
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        opened(tmp_path / "run", other)
    assert "data.batch was 4 and is 8" in str(error.value)
    assert "data.inner.seed was 0 and is 1" in str(error.value)
    assert "lr" not in str(error.value).split("settings:")[1]
    fault = folder_fault(tmp_path / "run", {**CONFIG, "new": None, "lr": 0.2})
    assert fault is not None
    assert "lr was 0.1 and is 0.2" in fault
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 0.1


def test_foreign_and_damaged_folders_are_refused(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        opened(tmp_path / "foreign")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a run needs a folder"):
        opened(tmp_path / "file")
    opened(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"lr"')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        opened(tmp_path / "run")


def test_a_folder_that_was_only_begun_is_used(tmp_path):
    """A process was killed between the lock and the settings."""
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.unfinished").write_text('{"lr')
    opened(tmp_path)
    assert not list(tmp_path.glob("*.unfinished"))


def test_another_process_is_refused_until_the_first_ends(tmp_path):
    program = (
        "import sys; from sae_jax.run.folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1], {}); print('mine', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="another process is training in"):
            opened(tmp_path / "run", {})
        other.kill()
    opened(tmp_path / "run", {})


def test_each_start_is_noted(tmp_path):
    for _ in range(3):
        opened(tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "environment.jsonl")
    assert len(lines) == 3
    assert lines[0]["versions"]["jax"] == jax.__version__
    assert lines[0]["command"] == sys.argv
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode == 0:
        assert lines[0]["commit"].removesuffix("+") == done.stdout.strip()
    else:  # a copy without its history
        assert lines[0]["commit"] is None


LINES = [
    {"step": t, "sae": sae, "kind": "train", "rows": 4 * t, "loss": 1 / t, "none": None}
    for t in (2, 4, 6)
    for sae in ("one", "two")
]


def noted(path, start, lines):
    log = JsonLines(path, start)
    for line in lines:
        log.write(line)
    log.close()


def test_lines_of_steps_to_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    noted(path, 0, LINES)
    whole = path.read_bytes()
    assert read_lines(path) == LINES
    for start in (0, 2, 3, 4, 5, 6, 7):
        noted(path, start, [line for line in LINES if line["step"] >= start])
        assert path.read_bytes() == whole


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    noted(path, 0, LINES)
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1)
    for cut in range(second + 1, len(whole)):
        path.write_bytes(whole[:cut])
        noted(path, 4, LINES[2:])
        assert path.read_bytes() == whole, cut
    path.unlink()
    noted(path, 4, LINES[2:])
    assert read_lines(path) == LINES[2:]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would show: purged steps go, later files come after."""
    shown: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            body = data[12 : 12 + size]
            checksum = int.from_bytes(data[12 + size : 16 + size], "little")
            assert checksum == masked_crc32c(body)
            data = data[16 + size :]
            event = Event.FromString(body)
            if event.HasField("session_log"):
                shown = {at: v for at, v in shown.items() if at[1] < event.step}
            for value in event.summary.value:
                shown[value.tag, event.step] = value.simple_value
    return shown


def test_tensorboard_holds_the_same_values(tmp_path):
    log = TensorBoard(tmp_path, 0)
    for line in LINES:
        log.write(line | {"loss": -1.0} if line["step"] > 3 else line)
    log.close()
    log = TensorBoard(tmp_path, 4)  # steps 4 and 6 are done again, 6 is not reached
    for line in LINES[2:4]:
        log.write(line)
    log.close()
    for sae in ("one", "two"):
        want = {("train/loss", t): np.float32(1 / t) for t in (2, 4)}
        want |= {("train/rows", t): 4.0 * t for t in (2, 4)}
        assert scalars(tmp_path / sae) == want


class FakeWandb(types.ModuleType):
    """Records what is asked of it."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder in ("my-run", "my-run", "a/my-run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        log = Wandb(tmp_path / folder, "saes", {"lr": 0.1})
    log.write(LINES[3])
    log.flush()
    log.close()
    [(_, first), (_, again), (_, options), *rest] = fake.calls
    assert first["id"] == again["id"] != options["id"]
    assert options["project"] == "saes"
    assert options["name"] == "my-run"
    assert options["resume"] == "allow"
    assert options["config"] == {"lr": 0.1}
    assert rest == [
        ("log", {"two/train/rows": 16, "two/train/loss": 0.25}, 4),
        ("finish",),
    ]


def test_a_run_leaves_its_folder(tmp_path, monkeypatch):
    fake, rows = FakeWandb(), np.random.default_rng(0).normal(size=(40, 6))
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def train():
        with Stop() as stop:
            return train_in_folder(
                tmp_path / "run",
                {"steps": 6},
                {"one": Member(SAE(6, 8, "topk(k=2)"), "x")},
                InMemory({"x": rows.astype(np.float32)}, batch=8),
                Recipe(steps=6),
                stop=stop,
                every=Every(log=2, save=4),
                evaluate=lambda name, sae, variables: {"score": 0.5, "bad": np.nan},
                about={"lm": "none", "site": "never"},
                wandb="saes",
                progress=False,
            )

    trained, again = train()["one"], train()["one"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.json", "environment.jsonl", "metrics.jsonl", "timing.jsonl"),
        *("tensorboard", "checkpoints", "saes", ".lock", "wandb_id"),
    }
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert trained.history == again.history == lines
    assert [(line["step"], line["kind"]) for line in lines] == [
        *((2, "train"), (4, "train"), (6, "train"), (6, "eval")),
    ]
    assert lines[-1] == {
        **{"step": 6, "sae": "one", "kind": "eval", "rows": 48},
        **{"score": 0.5, "bad": None},
    }
    shown = scalars(tmp_path / "run" / "tensorboard" / "one")
    want = {
        (f"{line['kind']}/{key}", line["step"]): np.float32(value)
        for line in lines
        for key, value in line.items()
        if key not in ("step", "sae", "kind") and value is not None
    }
    assert shown == want
    assert {call[2] for call in fake.calls if call[0] == "log"} == {2, 4, 6}
    saved = load(tmp_path / "run" / "saes" / "one")
    assert saved.about["lm"] == "none"
    assert saved.about["site"] == "x"
    np.testing.assert_array_equal(
        saved.variables.params["W_enc"], again.variables.params["W_enc"]
    )
    assert os.listdir(tmp_path / "run" / "saes") == ["one"]
