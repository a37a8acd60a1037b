"""The command line: manuals, dry runs, refusals, and a whole harvest."""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import pytest

import launch
from sae_jax import settings
from sae_jax.activations import Shards

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Where compiled programs go by default; never the user's own folder."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "sae_jax" / "xla"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@dataclass(frozen=True)
class Training:
    """How it is trained."""

    lr: Annotated[float, "learning rate"] = 1e-3
    log: Annotated[bool, "whether it is logged"] = False


@dataclass
class Config:
    """What can be set."""

    name: Annotated[str, "of the run, " + "told-at-length " * 6] = "a b"
    join: Annotated[bool, "whether it is joined"] = True
    train: Training = Training()

    def estimates(self) -> dict[str, str]:
        return {"parameters": "1,024", "rate": f"{self.train.lr}"}


def test_help_lists_all_experiments_and_how_to_go_on():
    done = run("--help")
    assert done.returncode == 0
    for path in (ROOT / "experiments").glob("[a-z]*.py"):
        first = path.read_text().split("\n")[0].strip('".')
        assert f"\n  {path.stem}\n" in done.stdout
        assert first in done.stdout
    assert "--experiment=NAME --help" in done.stdout


def test_help_of_an_experiment_is_its_manual():
    done = run("--experiment=harvest", "--help", "--rows=many")
    assert done.returncode == 0
    assert done.stdout.startswith("Writes a language model's activations to disk")
    assert "Command:  python launch.py --experiment=harvest" in done.stdout
    for setting in ("--sites", "--dataset", "--rows", "--[no]join", "--lm"):
        assert f"\n  {setting}: " in done.stdout
    assert (
        "\n  --source: one of flax, torch (default: flax)\n"
        "      what runs it: transformers' Flax models, or any causal LM in PyTorch "
    ) in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 88


def test_a_manual_goes_section_by_section():
    text = launch.manual(Config())
    assert text == (
        "\nWhat can be set.\n"
        "\n"
        "  --name: text (default: 'a b')\n"
        "      of the run, told-at-length told-at-length told-at-length "
        "told-at-length\n"
        "      told-at-length told-at-length\n"
        "  --[no]join: true or false (default: true)\n"
        "      whether it is joined\n"
        "\nHow it is trained.\n"
        "\n"
        "  --config.train.lr: a number (default: 0.001)\n"
        "      learning rate\n"
        "  --config.train.log: true or false (default: false)\n"
        "      whether it is logged\n"
        "\nFlags of launch.py itself.\n"
        "\n"
        "  --experiment: which experiment to run\n"
        "  --dry_run: show what would be run, and stop\n"
        "  --compile_cache: folder for compiled programs (~/.cache/sae_jax/xla); "
        "empty: none\n"
        "  --distributed: one of several processes: on a TPU pod, under SLURM, or as "
        "said by\n"
        "  --coordinator: HOST:PORT of the first process\n"
        "  --processes: how many there are\n"
        "  --process: which one this is, from 0 on\n"
        "  --local_processes: start so many on this machine, and watch over them\n"
        "  --help: this text"
    )


def test_the_papers_setting_is_the_plain_default_of_its_experiment():
    text = run("--experiment=harvest_gpt2", "--help").stdout
    for default in ("Skylion007/openwebtext", "gpt2", "resid_pre.8", "128", "81924096"):
        assert f"(default: {default})" in text


def test_a_dry_run_shows_settings_in_a_form_that_can_be_given_again():
    done = run(
        *("--experiment=harvest", "--dry_run", "--verbosity=1"),
        *("--sites", "resid_pre.1, mlp_out.2"),
    )
    assert done.returncode == 0, done.stderr
    lines, _, estimates = done.stdout.partition("\n\n")
    assert estimates.startswith("rows: 1,000,000 of 2 sites, 384 wide in all")
    shown = dict(re.split(" += ", line) for line in lines.splitlines())
    assert shown["--experiment"] == "harvest"
    assert shown["--sites"] == "resid_pre.1,mlp_out.2"
    assert shown["--subset"] == "''"
    assert len({line.index(" = ") for line in lines.splitlines()}) == 1


def test_a_dry_run_of_sections_shows_estimates_and_reads_back():
    config, faults = settings.build(Config(), {"config.train.lr": "1/4", "name": "x y"})
    assert faults == []
    text = launch.shown("toy", config)
    assert text == (
        "--experiment       = toy\n"
        "--name             = 'x y'\n"
        "--join             = true\n"
        "--config.train.lr  = 0.25\n"
        "--config.train.log = false\n"
        "\n"
        "parameters: 1,024\n"
        "rate: 0.25"
    )
    lines = text.split("\n\n")[0].splitlines()[1:]
    given = dict(
        re.split(" += ", line.removeprefix("--"), maxsplit=1) for line in lines
    )
    texts = {flag: shlex.split(value)[0] for flag, value in given.items()}
    assert settings.build(Config(), texts) == (config, [])


@pytest.mark.parametrize("name", launch.EXPERIMENTS)
def test_the_defaults_of_every_experiment_can_be_written_out_and_read_back(name):
    config = importlib.import_module(f"experiments.{name}").Config()
    found = settings.declared(config)
    assert len(found) > 2
    for setting in found:
        (text,) = shlex.split(settings.show(setting.value))
        assert settings.parse(text, setting.kind) == setting.value
    assert settings.from_dict(type(config), settings.to_dict(config)) == config


def test_a_harvest_from_the_command_line_and_its_second_half(tmp_path, cache):
    """By default the embedded model and text; here nothing compiled is kept."""
    sites = ("resid_pre.1", "head_out.3")
    command = ["--experiment", "harvest", f"--out={tmp_path}", "--rows_per_shard=200"]
    command += ["--compile_cache="]
    for rows in (200, 300):
        done = run(*command, f"--sites={','.join(sites)}", f"--rows={rows}")
        assert done.returncode == 0, done.stderr
        assert f"{rows} rows of resid_pre.1, head_out.3" in done.stdout
        assert "rows/s" in done.stderr
    assert not cache.exists()
    assert Shards(tmp_path).widths == dict.fromkeys(sites, 192)
    assert len(Shards(tmp_path)) == 300


def test_a_second_start_finds_all_that_the_first_compiled(tmp_path, cache):
    command = ["--experiment=harvest", "--sites=resid_pre.1", "--rows=200"]
    kept = []
    for n in range(2):
        done = run(*command, f"--out={tmp_path / str(n)}")
        assert done.returncode == 0, done.stderr
        for word in ("cache", "feature", "rror"):  # such as: compiled for another CPU
            assert word not in done.stderr
        programs = cache.glob("*-cache")  # beside them, when each was last used
        kept.append({p.name: p.stat().st_mtime_ns for p in programs})
    assert any(name.startswith("jit_forward") for name in kept[0])
    assert kept[0] == kept[1]
    one, two = (
        Shards(tmp_path / str(n)).rows(np.arange(200), ("resid_pre.1",))
        for n in range(2)
    )
    np.testing.assert_array_equal(one["resid_pre.1"], two["resid_pre.1"])


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    launch.keep_programs(str(tmp_path / "file" / "xla"))
    said = capsys.readouterr().err
    assert said.startswith("nothing compiled is kept for the next start: ")
    assert str(tmp_path / "file" / "xla") in said
    assert jax.config.jax_compilation_cache_dir == before


def test_all_faults_of_a_command_are_one_list(tmp_path):
    out = tmp_path / "not_made"
    done = run(
        *("--experiment=harvest", f"--out={out}", "rows=3", "--row", "3", "--nojoin=1"),
        *("--rows=many", "--source=tensorflow", "--rows_per_shard=0", "--verbosity=x"),
        *("--config.lm=x", "--context"),
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert not out.exists()
    assert done.stderr.splitlines() == [
        "--nojoin=1: --nojoin=1 does not take an argument",
        "--context: Missing value for flag --context",
        "--verbosity=x: flag --verbosity=x: invalid literal for int() with base 10: "
        "'x'",
        "rows=3: settings are given as --name=value",
        "--row: there is no such setting. Did you mean --rows?",
        "--config.lm: there is no such setting. Did you mean --lm?",
        "--source: 'tensorflow' is not one of flax, torch",
        "--rows: 'many' is not an integer",
        "--rows_per_shard=0 must be at least 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["--experiment=harvst", "--help"],
            2,
            "--experiment: Unknown experiment 'harvst'. Did you mean 'harvest'? Known: "
            "audit, bench, bench_ensemble, bench_growth, bench_lm, bench_train, ",
        ),
        ([], 2, "--experiment is one of"),
        (["--experiment=harvest", "--lm=./no"], 2, "--lm: lm='./no' is not a folder"),
        (["--experiment=harvest", "--dataset=/no/such"], 2, "is not on this machine"),
    ],
)
def test_bad_commands_get_one_clear_error(arguments, status, message):
    done = run(*arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_fault_of_the_programs_own_keeps_its_traceback():
    """Only what the project says of bad input is shown as one line."""
    with pytest.raises(ValueError, match="invalid literal"):
        launch.main(lambda: int("x"))  # raised in this file, which is none of its own


def test_an_argument_takes_the_value_that_follows_it():
    assert launch.joined("--rows 3 -v 1 x --lr -1 --a=b c --join --out".split()) == [
        *("--rows=3", "-v=1", "x", "--lr=-1", "--a=b", "c", "--join", "--out"),
    ]
