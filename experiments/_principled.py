"""One dictionary against known attributes: all three tests; not an experiment."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from sae_jax.analysis.places import Place, Predicted, Rows, predictions, read
from sae_jax.analysis.principled import control, interpretability, phenomena
from sae_jax.analysis.principled.approximation import approximation, contrast, scores
from sae_jax.analysis.principled.supervised import Decomposed, Values, fvu
from sae_jax.analysis.prompts import Prompts, changed, draw
from sae_jax.analysis.tasks import Known
from sae_jax.lm.source import Source

HIGH = 0.8  # F1 from which on a feature counts as one that means something
Row: TypeAlias = dict[str, Any]
# From a place, rows there, and the values of their prompts.
Represent: TypeAlias = Callable[[Place, Float[np.ndarray, "N D"], Values], Decomposed]


class Trial(NamedTuple):
    """Prompts, what the model makes of them, and what does not depend on dictionaries.

    Attributes:
      fit: what dictionaries are fitted on, and properties are chosen on.
      tested: other prompts, on which all scores are counted.
      other: by attribute, the tested prompts with another value of it.
      fit_rows, rows, other_rows: of these at all places.
      clean: what the model predicts after the tested prompts.
      aims: by attribute, what it predicts when patched with the others' rows.
    """

    lm: Source
    known: Known
    places: tuple[Place, ...]
    fit: Prompts
    tested: Prompts
    other: dict[str, Prompts]
    fit_rows: Rows
    rows: Rows
    other_rows: dict[str, Rows]
    clean: Predicted
    aims: dict[str, Predicted]

    @classmethod
    def prepare(
        cls,
        lm: Source,
        tokenizer: Any,
        known: Known,
        places: Sequence[Place],
        *,
        n_fit: int,
        n_tested: int,
        seed: int = 0,
    ) -> "Trial":
        """Draws prompts and reads the model."""
        fit = draw(known.task, tokenizer, n_fit, seed=seed)
        tested = draw(known.task, tokenizer, n_tested, seed=seed + 1)
        other = {
            name: changed(tested, tokenizer, name, seed=seed + 2)
            for name in known.attributes
        }
        other_rows = {name: read(lm, one, places) for name, one in other.items()}
        return cls(
            lm,
            known,
            tuple(places),
            fit,
            tested,
            other,
            read(lm, fit, places),
            read(lm, tested, places),
            other_rows,
            predictions(lm, tested),
            {n: predictions(lm, tested, rows) for n, rows in other_rows.items()},
        )

    @property
    def sizes(self) -> dict[str, int]:
        """How many values each attribute has."""
        task = self.known.task
        return {name: len(task.choices(name)) for name in self.known.attributes}

    def model(self) -> Row:
        """How well the model does the task, and how far the places decide it."""
        right, contrasted = self.tested.answer, self.tested.answer != self.tested.wrong
        difference = self.clean.difference[contrasted]
        found: Row = {
            "accuracy": float((self.clean.token == right).mean()),
            "accuracy_among_answers": float((self.clean.among == right).mean()),
            "n_answers": len(np.unique([right, self.tested.wrong])),
            "logit_difference": float(difference.mean()),
            "right_over_wrong": float((difference > 0).mean()),
        }
        for name, aim in self.aims.items():
            found[f"{name}: follows the patch"] = float(
                (aim.token == self.other[name].answer).mean()
            )
            found[f"{name}: no edit"] = agreement(self.clean, aim)["agreement"]
        return found


def agreement(edited: Predicted, aim: Predicted) -> dict[str, float]:
    """How often two predictions are the same, of all tokens and among the answers."""
    return {
        "agreement": float((edited.token == aim.token).mean()),
        "among_answers": float((edited.among == aim.among).mean()),
    }


def measure(
    trial: Trial,
    represent: Represent,
    ks: Sequence[int],
    *,
    most: int = interpretability.MOST_IN_UNION,
    supervised: bool = False,
) -> Row:
    """All that is counted of one dictionary; `most`: values in a union of them."""
    values = trial.tested.values
    of = {p: represent(p, trial.rows[p], values) for p in trial.places}
    mean = {p: rows.mean(0) for p, rows in trial.fit_rows.items()}
    x_hat = {p: one.x_hat for p, one in of.items()}
    row: Row = {
        "fvu": float(np.mean([fvu(trial.rows[p], x_hat[p]) for p in of])),
        "l0": float(np.mean([(d.strengths != 0).sum(1).mean() for d in of.values()])),
        **approximation(trial.lm, trial.tested, trial.rows, x_hat, mean),
    }
    told = {} if supervised else meanings(trial, represent, of, row, most)
    if told:
        causal(trial, of, mean, told, row)
    row["edits"] = {
        name: edits(trial, represent, of, name, ks, told)
        for name in trial.known.attributes
    }
    return row


def edits(
    trial: Trial,
    represent: Represent,
    of: Mapping[Place, Decomposed],
    name: str,
    ks: Sequence[int],
    told: Mapping[Place, interpretability.Meaning],
) -> list[Row]:
    """An attribute's edits by k features at each place, the first without any."""
    other, aim = trial.other[name], trial.aims[name]
    targets = {
        p: represent(p, trial.other_rows[name][p], other.values) for p in trial.places
    }
    chosen = {
        p: control.greedy(
            trial.rows[p], trial.other_rows[name][p], of[p], targets[p], max(ks)
        )
        for p in trial.places
    }
    found: list[Row] = [{"k": 0, **agreement(trial.clean, aim), "weight": 0.0}]
    for k in sorted(ks):
        taken = {p: one.chosen[:, :k] for p, one in chosen.items()}
        new = {
            p: control.exchanged(trial.rows[p], of[p], targets[p], taken[p]) for p in of
        }
        row: Row = {"k": k, **agreement(predictions(trial.lm, trial.tested, new), aim)}
        row["weight"] = float(
            np.mean([control.removed_weight(of[p], taken[p]).mean() for p in of])
        )
        row["distance"] = float(
            np.mean(
                [(e.distance[:, k] / e.distance[:, 0]).mean() for e in chosen.values()]
            )
        )
        if told:
            new = {
                p: trial.rows[p]
                + control.highest(
                    of[p],
                    targets[p],
                    told[p].of_values[name].T[trial.tested.values[name]],
                    told[p].of_values[name].T[other.values[name]],
                    k,
                )
                for p in of
            }
            by_f1 = agreement(predictions(trial.lm, trial.tested, new), aim)
            row["by_f1"] = by_f1["agreement"]
        found.append(row)
    return found


def meanings(
    trial: Trial,
    represent: Represent,
    of: Mapping[Place, Decomposed],
    row: Row,
    most: int,
) -> dict[Place, interpretability.Meaning]:
    """What the features mean; puts the scores, and those by chance, into the row."""
    found, chance, active = {}, {}, {}
    fit_values, values = _asked(trial, trial.fit), _asked(trial, trial.tested)
    for p in trial.places:
        fit = represent(p, trial.fit_rows[p], trial.fit.values).strengths != 0
        active[p] = of[p].strengths != 0
        lots = (
            interpretability.shuffled(labels, seed=i)
            for i, labels in enumerate((fit_values, values), 1)
        )
        for told, (chosen_by, counted_by) in (
            (found, (fit_values, values)),
            (chance, lots),
        ):
            told[p] = interpretability.meaning(
                fit, chosen_by, active[p], counted_by, trial.sizes, most=most
            )
    for suffix, told in (("", found), ("_by_chance", chance)):
        f1 = np.concatenate([told[p].f1[active[p].any(0)] for p in told])
        row[f"f1_median{suffix}"] = float(np.median(f1)) if f1.size else 0.0
        row[f"f1_high{suffix}"] = float((f1 >= HIGH).mean()) if f1.size else 0.0
        row[f"n_high{suffix}"] = int((f1 >= HIGH).sum())
        each = [phenomena.told(one.of_values) for one in told.values()]
        row[f"told{suffix}"] = {
            n: float(np.mean([one[n] for one in each])) for n in trial.sizes
        }
    row["n_fired"] = int(sum(a.any(0).sum() for a in active.values()))
    row["split"] = _splits(trial, active, values)
    row["features"] = _best(trial, found, active)
    return found


def causal(
    trial: Trial,
    of: Mapping[Place, Decomposed],
    mean: Mapping[Place, Float[np.ndarray, " D"]],
    told: Mapping[Place, interpretability.Meaning],
    row: Row,
) -> None:
    """Only the features that mean something are kept, or only they are taken away."""
    kept = {
        p: (d.strengths * (told[p].f1 >= HIGH)) @ d.directions for p, d in of.items()
    }
    only = {p: d.bias + kept[p] for p, d in of.items()}
    without = {p: trial.rows[p] - kept[p] for p in of}
    found = scores(
        row["ld_clean"],
        row["ld_mean"],
        contrast(trial.lm, trial.tested, only),
        contrast(trial.lm, trial.tested, without),
    )
    row["keep_only_high"] = found["sufficiency"]
    row["without_high"] = found["necessity"]


def _asked(trial: Trial, prompts: Prompts) -> dict[str, np.ndarray]:
    return {name: prompts.values[name] for name in trial.known.attributes}


def _splits(
    trial: Trial, active: Mapping[Place, np.ndarray], values: Values
) -> dict[str, dict[str, Any]]:
    """Over-splitting of each value, at the first place."""
    fired = active[trial.places[0]]
    return {
        name: {
            choice: phenomena.split(fired, values[name] == v)._asdict()
            for v, choice in enumerate(trial.known.task.choices(name))
        }
        for name in trial.sizes
    }


def _best(
    trial: Trial,
    told: Mapping[Place, interpretability.Meaning],
    active: Mapping[Place, np.ndarray],
    most: int = 10,
) -> list[Row]:
    """The features that mean something most clearly."""
    choices = {name: trial.known.task.choices(name) for name in trial.sizes}
    rows = [
        {
            "place": str(p),
            "feature": int(j),
            "f1": float(one.f1[j]),
            "fires": float(active[p][:, j].mean()),
            "means": said.text(choices),
        }
        for p, one in told.items()
        for j in np.argsort(-one.f1)[:most]
        if (said := one.chosen[j]) is not None
    ]
    return sorted(rows, key=lambda row: -row["f1"])[:most]
