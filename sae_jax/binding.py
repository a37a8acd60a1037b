"""From spec strings to rules with values: `parse("topk(k=32)")`."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sae_jax import checks, registry
from sae_jax.contract import RULES, Rule, keywords


@dataclasses.dataclass(frozen=True)
class BoundRule:
    """A rule with values for all its hyperparameters, all of them Python constants.

    `ceiling` is the largest value that the knob takes in this run; the knob itself
    unless a schedule raises it.
    """

    rule: Rule
    values: tuple[tuple[str, Any], ...]
    ceiling: float | None = None

    @property
    def hp(self) -> dict[str, Any]:
        """The hyperparameters by name."""
        return dict(self.values)

    @property
    def top(self) -> float:
        """The largest value that the knob may take."""
        return self.hp[self.rule.knob] if self.ceiling is None else self.ceiling

    @property
    def spec(self) -> str:
        """The spec string that `parse` reads back."""
        return registry.format_spec(self.rule.name, self.hp)

    def __repr__(self) -> str:
        return self.spec

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies as the spec string: the rule itself holds functions."""
        return parse, (self.spec, self.ceiling)

    def faults(self, n_features: int) -> list[str]:
        """What is wrong with the hyperparameters for an SAE of this width."""
        found = self.call(self.rule.faults, n_features)
        return [f"{self.rule.name}: {fault}" for fault in found]

    def call(self, function: Callable[..., Any], *args: Any, **also: Any) -> Any:
        """Calls one of the rule's functions with the hyperparameters that it reads.

        Values in `also` (`train`, a traced knob) go before the bound ones.
        """
        given = {**self.hp, **also}
        for name, value in self.values:
            top = self.top if name == self.rule.knob else value
            if isinstance(top, (int, float)):
                given[f"{name}_max"] = top
        names = {p.name for p in keywords(function)}
        return function(*args, **{n: v for n, v in given.items() if n in names})


def bind(rule: Rule, arguments: Mapping[str, Any]) -> BoundRule:
    """Fills in defaults and checks names and values, reporting all faults at once."""
    known = rule.hyperparameters()
    faults = [
        f"{rule.name}: {checks.unknown('argument', name, known)}"
        for name in arguments
        if name not in known
    ]
    values: dict[str, Any] = {}
    for name, (annotation, default) in known.items():
        value = arguments.get(name, default)
        if value is inspect.Parameter.empty:
            example = registry.format_spec(rule.name, dict(rule.example))
            faults.append(f"{rule.name} needs {name}; for example {example}.")
            continue
        fault = checks.value_fault(name, value, annotation)
        if fault:
            faults.append(f"{rule.name}: {fault}")
        value = value.item() if isinstance(value, np.generic) else value
        values[name] = tuple(value) if isinstance(value, list) else value
    checks.raise_all(faults)
    return BoundRule(rule, tuple(values.items()))


def parse(spec: str, ceiling: float | None = None) -> BoundRule:
    """The rule that a spec string names, with its arguments checked."""
    name, arguments = registry.parse_spec(spec)
    return dataclasses.replace(bind(RULES[name], arguments), ceiling=ceiling)
