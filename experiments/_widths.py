"""What is said of errors over the width of dictionaries; not an experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments._dark_matter import Errors
from sae_jax.analysis.width_scaling import Law, Predicted, predict_larger, width_law
from sae_jax.report.dark_matter import LINES

ONE_L0 = 1.1  # a larger ratio of L0s is said


def laws_of(
    points: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Law], dict[str, str]]:
    """The laws of what is drawn over the width; why there is none of the others."""
    laws, no_law = {}, {}
    for name in LINES:
        known = [row for row in points if name in row]
        if not known:
            continue
        try:
            laws[name] = width_law(
                [row["n_features"] for row in known], [row[name] for row in known]
            )
        except ValueError as error:
            no_law[name] = str(error)
    return laws, no_law


def predictions(
    points: Sequence[Mapping[str, Any]], errors: Errors
) -> dict[str, Predicted]:
    """Of each SAE, how far the errors of tokens follow from those of narrower ones."""
    found = {}
    for row in points:
        narrower = [p["name"] for p in points if p["n_features"] < row["n_features"]]
        if narrower:
            larger = errors.found[row["name"]].squared_error
            smaller = [errors.found[name].squared_error for name in narrower]
            half = np.arange(len(larger)) < len(larger) // 2
            found[row["name"]] = predict_larger(np.stack(smaller, 1), larger, half)
    return found


def said_of_widths(
    points: Sequence[Mapping[str, Any]],
    laws: Mapping[str, Law],
    no_law: Mapping[str, str],
    tokens: Mapping[str, Predicted],
) -> str:
    """All that there is to say of widths."""
    lines = ["FVU = c + a W^-m over the number of features W, with standard errors:"]
    for name, law in laws.items():
        lines.append(
            f"  {LINES[name]}: c = {law.c:.4f} ± {law.c_error:.4f}, a = {law.a:.4g}, "
            f"m = {law.m:.3f} ± {law.m_error:.3f}"
        )
    lines += [f"  {LINES[name]}: no law, {why}" for name, why in no_law.items()]
    l0s = [row["l0"] for row in points]
    if l0s and max(l0s) > ONE_L0 * min(l0s):
        lines.append(
            f"  L0 is {min(l0s):.1f} to {max(l0s):.1f}: the law is of one L0, and part "
            f"of this fall is theirs."
        )
    lines += ["", "A token's squared error from those at all smaller widths, R2:"]
    lines += [
        f"  {name}: {one.r2:.3f} (shuffled tokens {one.by_chance:.3f})"
        for name, one in tokens.items()
    ]
    return "\n".join(lines if tokens else lines[:-2])
