"""The linear and nonlinear error of several SAEs; not an experiment."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from sae_jax.analysis import gradient_pursuit
from sae_jax.analysis.dark_matter import DarkMatter, dark_matter
from sae_jax.evaluation import Evaluator
from sae_jax.report.dark_matter import parts_text
from sae_jax.trained import TrainedSAE

READ_ME = (
    "How much of an SAE's error is a linear function of the row that it read, after "
    "Engels, Riggs, Tegmark 2024 (arXiv:2410.14670). Fitted on the first half of the "
    "contexts, {fitted:,} tokens, and scored on the second, {scored:,}."
)
PREFIX = "dark_"  # of the columns in results.csv


class Errors(NamedTuple):
    """What was found.

    Attributes:
      found: by the name of the SAE.
      rows: one for each of them, with its scores.
      refused: why of the others nothing is known.
      heading: what the numbers are.
    """

    found: dict[str, DarkMatter]
    rows: list[dict[str, Any]]
    refused: list[str]
    heading: str

    def text(self) -> str:
        """All of it in columns."""
        table = [parts_text(self.rows)] if self.rows else []
        return "\n\n".join([self.heading, *table, *self.refused])

    def beside(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """These rows with the scores beside their own."""
        scores = {
            row["name"]: {f"{PREFIX}{n}": v for n, v in row.items() if n != "name"}
            for row in self.rows
        }
        return [{**row, **scores.get(row["name"], {})} for row in rows]


def errors_of(
    saes: Mapping[str, TrainedSAE],
    evaluator: Evaluator,
    *,
    pursuit: bool = False,
    intercept: bool = False,
) -> Errors:
    """Splits the errors of SAEs; one of which that cannot be done is said."""
    first, second = evaluator.heldout.halves()
    heading = READ_ME.format(fitted=int(first.use.sum()), scored=int(second.use.sum()))
    errors = Errors({}, [], [], heading)
    for name, one in saes.items():
        ways = {"": None}
        if pursuit:
            own = partial(gradient_pursuit.reconstruct, one.sae, one.variables)
            ways["pursuit_"] = own
        row: dict[str, Any] = {"name": name}
        try:
            for prefix, reconstruct in ways.items():
                found = dark_matter(
                    evaluator,
                    one.sae,
                    one.variables,
                    one.about["site"],
                    reconstruct=reconstruct,
                    intercept=intercept,
                )
                row |= {f"{prefix}{n}": value for n, value in found.scores.items()}
                errors.found.setdefault(name, found)
        except ValueError as error:
            errors.refused.append(f"{name} is left out: {error}")
            continue
        errors.rows.append(row)
    return errors
