"""How well circuits were found, as text; not an experiment."""

from typing import Any

import numpy as np

from sae_jax.analysis.circuits import Found


def in_columns(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and the range."""
    scores = (*Found._fields, "faithfulness")
    lines = ["Mean over seeds (lowest to highest); in brackets by chance"]
    for kind in dict.fromkeys((row["model"], row["truth"]) for row in rows):
        own = [row for row in rows if (row["model"], row["truth"]) == kind]
        lines.append(
            f"{kind[0]}, circuit by {kind[1]}: {own[0]['in_circuit']} of "
            f"{own[0]['heads']} heads, {len(own)} seeds"
        )
        for name in scores:
            beside = "_of_others" if name == "faithfulness" else "_shuffled"
            values, chance = (
                np.array([row[n] for row in own if row.get(n) is not None], float)
                for n in (name, f"{name}{beside}")
            )
            if len(values):
                lines.append(
                    f"  {name:<13} {values.mean():6.3f} ({values.min():.2f} to "
                    f"{values.max():.2f})  [{chance.mean():.3f}]"
                )
    return "\n".join(lines)
