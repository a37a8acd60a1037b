"""From the arrays of a file to an SAE: names, shapes and sizes, checked together.

A format says under which names it keeps what we call `W_enc [F, D_in]`, `b_enc [F]`,
`W_dec [F, D_out]` and `b_dec [D_out]`, and which `Counterpart` it is; `kinds.toml` says
by which of our rules such a one is read.
"""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_jax import checks
from sae_jax.binding import bind
from sae_jax.exchange.tensors import Held, told
from sae_jax.model import SAE
from sae_jax.rules import RULES
from sae_jax.trained import TrainedSAE, from_arrays
from sae_jax.treatment import Treatment

MOST_JSON = 8 * 2**20
AXES = {
    "W_enc": ("F", "D_in"),
    "W_dec": ("F", "D_out"),
    "b_dec": ("D_out",),
    "shared_threshold": (),
}  # all others: one number for each feature
# A threshold of 0 or below lets every positive value through, as the least one does.
LEAST = np.finfo(np.float32).tiny


class Foreign(NamedTuple):
    """An SAE as another library describes it.

    Attributes:
      kind: an entry of `kinds.toml`.
      arrays: by our names, rows for features; float32.
      settings: numbers such as k.
      centre: whether the encoder sees `x - b_dec`.
      treatment: what is done to rows first.
      transcoder: whether it aims at something other than its input.
      about: provenance.
    """

    kind: str
    arrays: dict[str, np.ndarray]
    settings: Mapping[str, Any]
    centre: bool
    about: dict[str, Any]
    treatment: Treatment = "none"
    transcoder: bool = False


@cache
def table(name: str) -> dict[str, Any]:
    """A table of data that lies beside this file."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text())


def description(path: Path) -> dict[str, Any]:
    """What a file of JSON holds, an object of finite numbers."""
    with told(path, RecursionError):
        if path.stat().st_size > MOST_JSON:
            raise ValueError("it is too large for a description.")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object.")
    return found


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON.")


def setting(path: Path, found: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """An entry of a description, of one of these types."""
    value = found.get(name)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path}: {name} is {value!r}; needed is {needed}.")
    return value


def take(
    path: Path,
    held: Mapping[str, Held],
    keys: Mapping[str, str],
    *,
    sizes: Mapping[str, int] | None = None,
    ignored: frozenset[str] = frozenset(),
    transcoder: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays by our names, if all are there, fit together, and none is left over.

    A key that ends in `.T` stands for the transpose of the array. `sizes` are those
    that a description claims.
    """
    sizes, faults = dict(sizes or {}), []
    if not transcoder and "D_in" in sizes:
        sizes["D_out"] = sizes["D_in"]
    # The matrices first: what they say of sizes is more likely right.
    for ours, key in sorted(keys.items(), key=lambda k: not k[0].startswith("W_")):
        theirs, turned = key.removesuffix(".T"), key.endswith(".T")
        if theirs not in held:
            faults.append(f"{theirs} is missing.")
            continue
        found, axes = held[theirs], AXES.get(ours, ("F",))
        axes = axes[::-1] if turned else axes
        axes = axes if transcoder else tuple(a.replace("D_out", "D_in") for a in axes)
        given = list(found.shape)
        if len(given) == len(axes):
            for axis, size in zip(axes, given, strict=True):
                sizes.setdefault(axis, size)
        needed = [sizes.get(axis, axis) for axis in axes]
        if given != needed or not found.floats:
            faults.append(f"{theirs} has shape {given}; needed are floats of {needed}.")
    used = {key.removesuffix(".T") for key in keys.values()}
    faults += [f"{n!r} is foreign." for n in sorted(held.keys() - used - ignored)]
    checks.raise_all(f"{path}: {fault}" for fault in faults)
    return {ours: _values(path, held, key) for ours, key in keys.items()}


def _values(path: Path, held: Mapping[str, Held], key: str) -> np.ndarray:
    name = key.removesuffix(".T")
    with np.errstate(all="ignore"):
        values = np.asarray(held[name].get()).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{path}: {name} has NaN or infinite values (in float32), which no SAE "
            f"can use. Fetch it again, or ask those who made it."
        )
    return np.asarray(values.T if key.endswith(".T") else values, order="C")


def assembled(path: Path, foreign: Foreign) -> TrainedSAE:
    """The SAE that it is here."""
    record = table("kinds")[foreign.kind]
    if record["rule"] not in RULES:
        raise ValueError(
            f"{path} needs the rule {record['rule']!r}, which is not among those here: "
            f"{', '.join(RULES)}."
        )
    rule = RULES[record["rule"]]
    settings = record.get("settings", {})
    needed = {ours: foreign.settings[theirs] for ours, theirs in settings.items()}
    arrays = derived(foreign.arrays)
    W_dec = arrays["W_dec"]
    try:
        sae = SAE(
            d_in=arrays.get("W_enc", W_dec).shape[1],
            n_features=len(W_dec),
            rule=bind(rule, needed),
            d_out=W_dec.shape[1] if foreign.transcoder else None,
            treatment=foreign.treatment,
            centre=_unless(rule.centres or foreign.transcoder, foreign.centre),
            encoder_bias=_unless(rule.reads_b_enc, True) if "b_enc" in arrays else None,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ours = {f"params.{name}": name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for part in ("params", "state"):
        ours |= {f"{part}.{n}": theirs for n, theirs in record.get(part, {}).items()}
    given = {name: arrays[theirs] for name, theirs in ours.items() if theirs in arrays}
    return TrainedSAE(sae, from_arrays(sae.shapes(), given, path), foreign.about)


def derived(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With what our rules keep in another form than the files do."""
    more = {"one": np.ones((), np.float32)}
    if "threshold" in arrays:
        more["log_threshold"] = np.log(np.maximum(arrays["threshold"], LEAST))
    return {**arrays, **more}


def _unless(default: bool, value: bool) -> bool | None:
    return None if value == default else value
