"""Settings: what a dataclass declares, read from text, with all its faults at once.

Fields are `Annotated[type, "description"]`; one that holds a dataclass is a section.
`rows` of the whole is the flag `--rows`, `lr` of its section `train` the flag
`--config.train.lr`. Every setting has a default.
"""

import dataclasses
import difflib
import inspect
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, NewType

from sae_jax import checks, rules

# A rule as text, `name(argument=value)`; checked as soon as it is read.
Spec = NewType("Spec", str)

Place = tuple[str, ...]
Flags = dict[Place, str]


class Setting(NamedTuple):
    """One setting: its flag, where it stands, what it may be, is, and means."""

    flag: str
    path: Place
    kind: Any
    value: Any
    text: str
    heading: str


def declared(config: Any, path: Place = ()) -> list[Setting]:
    """The settings of a configuration with their values, then those of its sections."""
    described = {}
    # From the base up: a subclass that only changes a default keeps the description.
    for base in reversed(type(config).__mro__):
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            if typing.get_origin(hint) is typing.Annotated:
                described[name] = typing.get_args(hint)[:2]
    heading = (inspect.getdoc(type(config)) or "").split("\n")[0]
    own, nested = [], []
    for field in dataclasses.fields(config):
        here, value = (*path, field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested += declared(value, here)
            continue
        if field.name not in described:
            raise TypeError(f"Describe {field.name}: Annotated[type, 'description'].")
        kind, text = described[field.name]
        needed(kind)  # a type that no text can give is refused here, not when it is set
        flag = ".".join(("config", *here) if path else here)
        own.append(Setting(flag, here, kind, value, text, heading))
    return own + nested


def _number(text: str) -> float:
    """A finite number, also as a fraction: 1/32."""
    above, _, below = text.partition("/")
    value = float(above) / float(below) if below else float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _integer(text: str) -> int:
    """A whole number, also as 1_000_000 or 1e6."""
    if "e" not in text.lower():
        return int(text)
    value = float(text)
    # Beyond 2^53 a float is no longer the number that was written.
    if not value.is_integer() or abs(value) > 2**53:
        raise ValueError
    return int(value)


SWITCH = {"true": True, "1": True, "false": False, "0": False}
PLAIN: dict[Any, tuple[str, Callable[[str], Any]]] = {
    str: ("text", str),
    int: ("an integer", _integer),
    float: ("a number", _number),
    bool: ("true or false", lambda text: SWITCH[text.lower()]),
    Spec: ("a rule, name(argument=value)", Spec),
}
BESIDE = {(...,): ", several by commas", (types.NoneType,): ", or none"}


def needed(kind: Any) -> str:
    """What a value of this type is, in words."""
    inner = typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind][0]
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if inner[1:] in BESIDE:
        return needed(inner[0]) + BESIDE[inner[1:]]
    raise TypeError(f"{kind} cannot be a setting; settings.py says which types can.")


def parse(text: str, kind: Any) -> Any:
    """The value that a text stands for; `ValueError` if it stands for none."""
    inner = typing.get_args(kind)
    if inner[1:] == (...,):
        values, faults = [], []
        for item in _split(text):
            try:
                values.append(parse(item, inner[0]))
            except ValueError as error:
                faults.append(str(error))
        checks.raise_all(faults)
        return tuple(values)
    if inner[1:] == (types.NoneType,):
        if text.lower() == "none":
            return None
        try:
            return parse(text, inner[0])
        except ValueError as error:
            raise ValueError(f"{error}, or none") from None
    if kind is Spec:
        rules.parse(text)  # which says itself what is wrong
    try:
        if typing.get_origin(kind) is Literal:
            return {str(option): option for option in inner}[text]
        return PLAIN[kind][1](text)
    except (KeyError, ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not {needed(kind)}") from None


def _split(text: str) -> list[str]:
    """The items of a list, empty ones left out: what commas outside brackets part."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return [item.strip() for item in items if item.strip()]


def show(value: Any) -> str:
    """A value as a shell takes it, for `parse` to read again."""
    items = value if isinstance(value, tuple) else (value,)
    texts = (str(v).lower() if isinstance(v, bool | None) else str(v) for v in items)
    return shlex.quote(",".join(texts))


def build(
    default: Any, given: Mapping[str, str], also: Iterable[str] = ()
) -> tuple[Any, list[str]]:
    """The configuration with the settings in `given` (text by flag), and all faults.

    Where a text cannot be read or a section refuses its values, the default stands in,
    so that the rest is checked as well. Files named in a setting `rule_files` are
    loaded first, as specs may need them. `also` are flags of others, for near misses.
    """
    settings = declared(default)
    flags = {s.path: s.flag for s in settings}
    known = [*flags.values(), *also]
    faults = [_unknown(flag, known) for flag in given if flag not in flags.values()]
    values: dict[Place, Any] = {}
    settings.sort(key=lambda s: s.path[-1] != "rule_files")
    for flag, path, kind, value, *_ in settings:
        if flag in given:
            try:
                values[path] = value = parse(given[flag], kind)
            except ValueError as error:
                faults += [f"--{flag}: {line}" for line in str(error).splitlines()]
        for file in value if path[-1] == "rule_files" else ():
            try:
                rules.load_file(file)
            except Exception as error:  # whatever a user's file raises
                what = "" if type(error) is ValueError else f"{type(error).__name__}: "
                lines = f"{what}{error}".splitlines()
                faults += [f"--{flag}={file}: {line}" for line in lines]
    config = _rebuilt(default, (), values, flags, faults)
    if hasattr(config, "faults"):
        faults += [_concerning(fault, (), flags) for fault in config.faults()]
    if not faults and hasattr(config, "conflicts"):
        faults += [_concerning(fault, (), flags) for fault in config.conflicts()]
    return config, faults


def _unknown(flag: str, known: list[str]) -> str:
    """Says which flag was meant, by its whole name or by the last parts of it."""
    ends: dict[str, list[str]] = {}
    for name in known:
        for i in range(name.count(".") + 1):
            ends.setdefault(name.split(".", i)[-1], []).append(f"--{name}")
    near = difflib.get_close_matches(flag, ends, n=1, cutoff=0.8)
    near += difflib.get_close_matches(flag.split(".")[-1], ends, n=1)
    meant = f"Did you mean {' or '.join(ends[near[0]])}?" if near else "See --help."
    return f"--{flag}: there is no such setting. {meant}"


def _rebuilt(
    default: Any, path: Place, values: dict[Place, Any], flags: Flags, faults: list[str]
) -> Any:
    """This section with new values, or as it was where it refuses them."""
    now = {}
    for field in dataclasses.fields(default):
        here, old = (*path, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(old):
            now[field.name] = _rebuilt(old, here, values, flags, faults)
        elif here in values:
            now[field.name] = values[here]
    try:
        return dataclasses.replace(default, **now)
    except ValueError as error:
        faults += [_concerning(line, path, flags) for line in str(error).splitlines()]
        return default


def _concerning(line: str, path: Place, flags: Flags) -> str:
    """A sentence that begins with a setting's name, with its flag in that place."""
    name = re.match(r"\w*(\.\w+)*", line)[0]  # type: ignore[index]  # may be empty
    flag = flags.get((*path, *name.split(".")))
    if flag:
        return f"--{flag}{line[len(name) :]}"
    return f"--config.{'.'.join(path)}: {line}" if path else line


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values, section within section."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """The configuration that `to_dict` wrote; what it does not name has its default."""
    default = cls()
    flags = {s.path: s.flag for s in declared(default)}
    flat, faults = {}, []
    left: list[tuple[Place, Any]] = [((), values)]
    for path, value in left:  # which grows by what is in each section
        if isinstance(value, Mapping):
            left += [((*path, name), item) for name, item in value.items()]
        elif path in flags:
            flat[path] = tuple(value) if isinstance(value, list) else value
        else:
            known = map(".".join, flags)
            faults.append(checks.unknown("setting", ".".join(path), known))
    config = _rebuilt(default, (), flat, flags, faults)
    checks.raise_all(faults)
    return config
