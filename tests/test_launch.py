"""The command line: manuals, refusals, and a whole harvest."""

import subprocess
import sys
from pathlib import Path

import pytest

from sae_jax.activations import Shards

ROOT = Path(__file__).parent.parent


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_lists_all_experiments():
    text = launch("--help").stdout
    for path in (ROOT / "experiments").glob("[a-z]*.py"):
        first = path.read_text().split("\n")[0].strip('".')
        assert f"{path.stem} " in text
        assert first in text


def test_help_of_an_experiment_is_its_manual():
    text = launch("--experiment=harvest", "--help").stdout
    assert "Command:  python launch.py --experiment=harvest" in text
    for setting in ("--sites", "--dataset", "--rows", "--[no]join", "--lm"):
        assert f"  {setting}" in text


def test_the_papers_setting_is_the_plain_default_of_its_experiment():
    text = launch("--experiment=harvest_gpt2", "--help").stdout
    for default in ("'Skylion007/openwebtext'", "'gpt2'", "'resid_pre.8'", "'128'"):
        assert f"default: {default}" in text


def test_a_harvest_from_the_command_line_and_its_second_half(tmp_path):
    """The default: the embedded model on the embedded text."""
    sites = ("resid_pre.1", "head_out.3")
    command = ["--experiment=harvest", f"--out={tmp_path}", "--rows_per_shard=200"]
    for rows in (200, 300):
        done = launch(*command, f"--sites={','.join(sites)}", f"--rows={rows}")
        assert done.returncode == 0, done.stderr
        assert f"{rows} rows of resid_pre.1, head_out.3" in done.stdout
        assert "rows/s" in done.stderr
    assert Shards(tmp_path).widths == dict.fromkeys(sites, 192)
    assert len(Shards(tmp_path)) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment=harvst"], "value should be one of"),
        ([], "--experiment is one of"),
        (["--experiment=harvest", "--row=3"], "Did you mean: rows"),
        (["--experiment=harvest", "--rows=many"], "rows"),
        (["--experiment=harvest", "--rows=0"], "error: rows=0 must be at least 1"),
        (["--experiment=harvest", "--source=tensorflow"], "value should be one of"),
        (["--experiment=harvest", "rows=3"], "settings are given as --name=value"),
        (["--experiment=harvest", "--lm=./no"], "error: lm='./no' is not a folder"),
        (["--experiment=harvest", "--dataset=/no/such"], "is not on this machine"),
    ],
)
def test_bad_commands_get_one_clear_error(arguments, message):
    done = launch(*arguments)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert message in text
    assert "Traceback" not in text
