"""Validation that names what was given, what is needed and what to do.

Faults are collected as sentences and raised together, so that a user mends
a configuration once instead of once per run.
"""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A hyperparameter that may be negative: `floor: Signed = Signed(-6.0)`.
Signed = typing.NewType("Signed", float)


def raise_all(faults: Iterable[str]) -> None:
    """Raises one `ValueError` holding every fault, or returns if there is none."""
    found = list(faults)
    if found:
        raise ValueError("\n".join(found))


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """Says that a name is not known, which one is nearest, and which there are."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names) or "none"
    return f"Unknown {kind} {given!r}.{hint} Known: {listed}."


def changed(before: Any, now: dict[str, Any]) -> str:
    """Which settings are not what they were, and how; empty if all are."""
    before = before if isinstance(before, dict) else {"settings": before}
    return "; ".join(
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )


def value_fault(name: str, value: Any, annotation: Any) -> str | None:
    """Checks one value against its annotation; of a union, the first type counts.

    Numbers must be finite, and not negative unless annotated as `Signed`.
    """
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        if value is None and types.NoneType in typing.get_args(annotation):
            return None
        annotation = typing.get_args(annotation)[0]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        options = typing.get_args(annotation)
        if value not in options:
            return f"{name}={value!r} must be one of {', '.join(map(repr, options))}."
        return None
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            return f"{name}={value!r} must be a non-empty list such as [0.5, 1.0]."
        item = typing.get_args(annotation)[0]
        faults = (value_fault(f"{name}[{i}]", v, item) for i, v in enumerate(value))
        return next((fault for fault in faults if fault), None)
    if annotation is bool:
        if not isinstance(value, bool):
            return f"{name}={value!r} must be True or False."
        return None
    signed = annotation is Signed
    if annotation in (int, float, Signed):
        whole = annotation is int
        good = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, good):
            return f"{name}={value!r} must be {'an integer' if whole else 'a number'}."
        if not math.isfinite(value) or (value < 0 and not signed):
            sign = "" if signed else " and not negative"
            return f"{name}={value!r} must be finite{sign}."
    return None


def field_faults(prefix: str, record: Any) -> list[str]:
    """Checks the fields of a dataclass that are plain values, each by its own type."""
    return [
        fault
        for name, hint in typing.get_type_hints(type(record)).items()
        if (fault := value_fault(f"{prefix}{name}", getattr(record, name), hint))
    ]


def is_traced(*arrays: Any) -> bool:
    """Whether any of these is an abstract value inside a JAX transformation."""
    return any(isinstance(a, jax.core.Tracer) for a in arrays)


def rows(
    name: str,
    x: Any,
    width: int,
    *,
    n_rows: int | None = None,
    mask: Any = None,
) -> None:
    """Checks that `x` is a non-empty batch of finite float rows of one width.

    Values, those of masked rows apart, are looked at only outside of jit, where a look
    is possible; inside, the step reports `finite` among its metrics.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise ValueError(
            f"{name} is a {type(x).__name__}; give an array of shape [rows, {width}]."
        )
    if len(x.shape) != 2 or x.shape[1] != width:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; needed is [rows, {width}]. "
            f"Reshape it, or build the SAE for the width of your activations."
        )
    if x.shape[0] == 0:
        raise ValueError(f"{name} has no rows; give at least one.")
    if n_rows is not None and x.shape[0] != n_rows:
        raise ValueError(f"{name} has {x.shape[0]} rows, x has {n_rows}; match them.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} holds {x.dtype}; activations are floats. Token ids go through "
            f"a language model first; other numbers through x.astype('float32')."
        )
    if is_traced(x, mask):
        return
    with jax.ensure_compile_time_eval():
        array = np if isinstance(x, np.ndarray) else jnp  # NumPy may hold float64
        wrong = ~array.isfinite(x).all(axis=1)
        if getattr(mask, "shape", None) == wrong.shape and mask.dtype == bool:
            wrong = wrong & mask
        bad = int(wrong.sum())
    if bad:
        raise ValueError(
            f"{name} has NaN or infinite values in {bad} of {x.shape[0]} rows. "
            f"Drop those rows or mend the source of the activations."
        )


def beside(name: str, other: Any, width: int, x: Any, *, mask: Any = None) -> None:
    """Checks what comes beside `x`, if it is there: rows of its own width, as many."""
    if other is not None:
        rows(name, other, width, n_rows=x.shape[0], mask=mask)


def mask(given: Any, x: Any) -> None:
    """Checks a mask over the rows of `x`, if there is one."""
    if given is None:
        return
    needed = f"needed is bool[{len(x)}], true for the rows that count."
    if not hasattr(given, "dtype"):
        raise ValueError(f"mask is a {type(given).__name__}; {needed}")
    if given.shape != x.shape[:1] or given.dtype != bool:
        raise ValueError(f"mask is {given.dtype}{list(given.shape)}; {needed}")


def shape(name: str, array: Any, needed: tuple[int, ...]) -> None:
    """Checks that an array of the SAE's has the shape that its description says."""
    if array.shape != needed:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}, this SAE needs {needed}; give the "
            f"variables that belong to it."
        )


def scale(constants: Mapping[str, Any]) -> None:
    """Checks that a sample gave a scale: rows of zeros give none."""
    if (
        not is_traced(*constants.values())
        and not np.isfinite([*constants.values()]).all()
    ):
        raise ValueError("The sample's rows are all zero; they tell no scale.")


def require_finite(metrics: Mapping[str, Any]) -> None:
    """Raises if the metrics of a step say that loss or gradients were not finite."""
    if not bool(metrics["finite"]):
        loss, step = float(metrics["loss"]), int(metrics["step"])
        raise FloatingPointError(
            f"Step {step} gave loss={loss} or a gradient that is not finite. "
            f"Look at the batch of that step, lower the learning rate, or clip."
        )
