import pytest

from tests import contract
from tests.bad import SABOTEURS

saboteurs = pytest.mark.parametrize(
    "broken", SABOTEURS, ids=[bound.rule.name for bound in SABOTEURS.values()]
)


def test_every_check_has_a_saboteur():
    assert set(SABOTEURS) == set(contract.CHECKS)


@saboteurs
def test_saboteur_fails_its_check(broken):
    with pytest.raises(Exception):  # noqa: B017, PT011 - however the check notices
        broken(SABOTEURS[broken])


@pytest.mark.slow  # of all pairs: a fifth of the suite
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
@saboteurs
def test_saboteur_passes_every_other_check(broken, check):
    if check is not broken:
        check(SABOTEURS[broken])
