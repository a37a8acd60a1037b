"""The house: one file a rule, nothing named elsewhere, imports that cost nothing."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sae_jax
import sae_jax.rules

ROOT = Path(__file__).parent.parent
BUILT_IN = {module.name for module in pkgutil.iter_modules(sae_jax.rules.__path__)}


def test_every_file_of_rules_registers_the_rule_of_its_name():
    ours = {
        name
        for name in sae_jax.RULES
        if str(sae_jax.RULES[name].encode.__module__).startswith("sae_jax.")
    }
    assert ours == BUILT_IN


@pytest.mark.parametrize("rule", sorted(BUILT_IN))
def test_no_other_file_of_the_package_names_a_rule(rule):
    """In code; prose and examples in docstrings may."""
    words = re.compile(
        rf"[\"'`]{rule}[\"'`(]|rules\.{rule}\b|import {rule}\b|(?<!nn\.)\b{rule}\("
    )
    for path in (ROOT / "sae_jax").rglob("*.py"):
        if path.stem != rule:
            code = re.sub(r'"""[\s\S]*?"""', "", path.read_text())
            code = re.sub(r"#.*", "", code)
            found = words.search(code)
            assert not found, f"{path}: {found}"


def test_no_file_is_longer_than_its_ceiling():
    for path in (ROOT / "sae_jax").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env},
        check=False,
    )


def test_import_is_silent_and_takes_no_device_network_or_torch():
    code = """
import socket, sys
def refuse(*args, **kwargs): raise RuntimeError("network at import")
socket.socket.connect = refuse
import sae_jax
from jax._src import xla_bridge
assert not xla_bridge._backends, "import started a backend"
heavy = "torch transformers datasets orbax.checkpoint matplotlib grain tensorboardX"
print(sorted({*heavy.split()} & set(sys.modules)))
assert {*sae_jax.__all__} <= {*dir(sae_jax)}
assert not {"orbax.checkpoint", "grain"} & set(sys.modules), "dir() imports"
from sae_jax import *
assert train is sae_jax.train and {"orbax.checkpoint", "grain"} <= set(sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert done.stderr == ""


def test_user_rules_load_once_and_say_what_is_wrong(tmp_path, capsys):
    before = len(sae_jax.RULES)
    sae_jax.load_file(Path(__file__).parent / "user_rules.py")
    assert len(sae_jax.RULES) == before
    with pytest.raises(ValueError, match="There is no file"):
        sae_jax.load_file(tmp_path / "absent.py")
    for folder in ("p", "q"):  # two files of one name are two files
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"loaded_{folder} = print('{folder}')"
        )
        sae_jax.load_file(tmp_path / folder / "mine.py")
    assert capsys.readouterr().out == "p\nq\n"
    again = tmp_path / "again.py"
    again.write_text(
        "from sae_jax import Rule, from_pre, register\n"
        "def topk(pre, *, k: int = 1): return pre\n"
        "register(Rule('topk', 'none', 'again', from_pre(topk), {}, 'k'))\n"
    )
    with pytest.raises(ValueError, match="There is a rule 'topk' already; rename"):
        sae_jax.load_file(again)


def test_a_rule_that_contradicts_itself_is_refused():
    def encode(inputs, params, state, *, k: int = 3):
        raise NotImplementedError

    def init(key, params, *, k: int = 4):
        raise NotImplementedError

    with pytest.raises(ValueError, match="declares k twice and differently"):
        sae_jax.Rule("x", "none", "none", encode, {}, "k", init=init)
    with pytest.raises(ValueError, match="Unknown hyperparameter 'kk'"):
        sae_jax.Rule("x", "none", "none", encode, {}, "kk")
