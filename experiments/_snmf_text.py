"""Neuron groups beside an SAE as text; not an experiment."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

K_PLANTED = 8  # groups
NAMES = {"snmf": "SNMF", "sae": "SAE"}


def in_columns(
    config: Any,
    planted: list[dict[str, dict[str, float]]],
    scores: Mapping[str, Mapping[str, float]],
    steering: Mapping[str, list[dict[str, float]]],
    levels: list[dict[str, Any]],
) -> str:
    """All of it as text."""
    lines = [f"Planted groups found, of {K_PLANTED}, {len(planted)} seeds:"]
    for name in planted[0] if planted else ():
        own = [seed[name] for seed in planted]
        error = np.mean([one["error"] for one in own])
        said = f"   error {error:.4f}" if np.isfinite(error) else ""
        lines.append(
            f"  {name:<9} {np.mean([o['found'] for o in own]):5.2f}   mean |cos| "
            f"{np.mean([o['cosine'] for o in own]):.3f}{said}"
        )
    lines += ["", f"{config.sites[0]}, {config.k} groups or features, held-out text:"]
    for name, row in scores.items():
        lines.append(
            f"  {NAMES[name]:<5} error {row['error']:.3f}, neurons {row['neurons']:.0f}"
            f", active {row['active']:.1f}\n"
            f"        S_CD above 0 for {row['s_cd_above_0']:.0%} "
            f"(shuffled {row['s_cd_shuffled_above_0']:.0%}), median "
            f"{row['s_cd_median']:.2f} (shuffled {row['s_cd_shuffled_median']:.2f})"
        )
    lines += ["", f"Steering at {config.sites[1]}: amount, concept, fluency, both:"]
    for name, rows in steering.items():
        lines.append(f"  {name}")
        lines += [
            f"    {row['amount']:5g} {row['concept']:.4f} {row['fluency']:.3f} "
            f"{row['both']:.4f}"
            for row in rows
        ]
    if levels:
        lines += ["", "Levels: error of the product"]
        lines += [f"  {r['way']:<9} {r['k']:4} {r['error']:.3f}" for r in levels]
    return "\n".join(lines)


def known(value: Any) -> Any:
    """None in place of what JSON has not."""
    if isinstance(value, Mapping):
        return {name: known(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [known(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
