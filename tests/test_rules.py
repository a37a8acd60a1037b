import pytest

import sae_jax
from sae_jax.binding import bind
from tests import contract

every_rule = pytest.mark.parametrize("name", list(sae_jax.RULES))
every_check = pytest.mark.parametrize(
    "check", contract.CHECKS, ids=lambda c: c.__name__
)


# Rule outermost: its checks run one after another and share compiled functions.
@every_check
@every_rule
def test_rule(check, name):
    rule = sae_jax.RULES[name]
    check(bind(rule, rule.example))
