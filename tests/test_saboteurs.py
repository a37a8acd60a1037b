import pytest

from tests import contract
from tests.bad import SABOTEURS

# One worker for all checks of a rule: they share its compiled functions.
saboteurs = pytest.mark.parametrize(
    "broken",
    [
        pytest.param(check, id=name, marks=pytest.mark.xdist_group(name))
        for check, name in ((c, bound.rule.name) for c, bound in SABOTEURS.items())
    ],
)


def test_every_check_has_a_saboteur():
    assert set(SABOTEURS) == set(contract.CHECKS)


@saboteurs
def test_saboteur_fails_its_check(broken):
    with pytest.raises(Exception):  # noqa: B017, PT011 - however the check notices
        broken(SABOTEURS[broken])


@saboteurs
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
def test_saboteur_passes_every_other_check(broken, check):
    if check is not broken:
        check(SABOTEURS[broken])
