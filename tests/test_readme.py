"""What the README says is run."""

import contextlib
import functools
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import sae_jax
from sae_jax import rules
from sae_jax.binding import bind
from tests import contract

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_table_of_rules_is_the_registry():
    shown = README.split("<!-- rules: begin -->\n")[1].split("<!-- rules: end -->")[0]
    current = [r for r in rules.table().splitlines() if "toy" not in r]
    assert shown.splitlines() == [row for row in current if "near_max" not in row]


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@functools.cache
def examples():
    """The names that exist after each of the README's examples, run in their order."""
    names: dict = {}
    after = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in BLOCKS:
            exec(block, names)
            after.append(dict(names))
    return after


def test_the_examples_run_and_do_what_they_say(capsys):
    trained, stepped, spread, read, audited, ruled = examples()
    assert "'nmse'" in capsys.readouterr().out
    assert trained["sae"].history[-1]["nmse"] < 0.2
    assert trained["x_hat"].shape == (4096, 64)
    assert (trained["again"](trained["activations"])[1] == trained["codes"]).all()
    assert stepped["metrics"]["l0"] == 8
    assert spread["metrics"]["l0"] == 8
    assert read["plain"].values["head_out.1"].shape == (*read["tokens"].shape, 192)
    assert read["plain"].losses.mean() < read["without"].losses.mean()
    assert read["gradients"]["resid_post.2"].any()
    assert read["read"].history[-1]["nmse"] < 0.6
    assert audited["evaluation"].scores["loss_recovered"] > 0.5
    assert audited["features"].highest[audited["loudest"]] > 0
    assert audited["new"].shape == (1, 16)
    mine, x = ruled["mine"], ruled["activations"]
    active = mine.encode(mine.init(jax.random.key(0)), x)
    assert (active.max(1) > 0).mean() > 0.98
    kept = jnp.where(active > 0, active, jnp.inf).min(1)
    assert (kept >= 0.4 * active.max(1)).all()


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
def test_the_example_rule_passes_what_every_rule_passes(check):
    examples()
    rule = sae_jax.RULES["near_max"]
    check(bind(rule, rule.example))


@pytest.mark.parametrize(
    "target",
    ["install", "demo", "test", "test-slow", "parity", "lock", "bench", "bench-lm"],
)
def test_every_make_target_that_is_named_exists(target):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
