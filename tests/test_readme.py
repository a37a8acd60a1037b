"""What the README says is run."""

import re
from pathlib import Path

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


def test_the_examples_run_and_do_what_they_say(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert "'nmse'" in capsys.readouterr().out
    assert names["metrics"]["nmse"] < 0.2
    assert names["x_hat"].shape == (4096, 64)
    active = names["mine"].encode(
        names["mine"].init(names["jax"].random.key(0)), names["activations"]
    )
    assert (active.max(1) > 0).mean() > 0.98
    kept = jnp.where(active > 0, active, jnp.inf).min(1)
    assert (kept >= 0.4 * active.max(1)).all()
    rule = sae_jax.RULES["near_max"]
    for check in contract.CHECKS:
        check(bind(rule, rule.example))


@pytest.mark.parametrize("target", ["install", "test", "test-slow", "parity", "lock"])
def test_every_make_target_that_is_named_exists(target):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
