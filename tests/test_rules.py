import pytest

import sae_jax
from sae_jax.binding import bind
from tests import contract

# One worker for all checks of a rule: they share its compiled functions.
every_rule = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in sae_jax.RULES]
)
every_check = pytest.mark.parametrize(
    "check", contract.CHECKS, ids=lambda c: c.__name__
)


@every_rule
@every_check
def test_rule(check, name):
    rule = sae_jax.RULES[name]
    check(bind(rule, rule.example))
