"""Runs an experiment.

    python launch.py --experiment=NAME --setting=value ...

`python launch.py --experiment=NAME --help` describes it and all its settings.
"""

import importlib
import sys
import traceback
import typing
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging

ROOT = Path(__file__).parent
EXPERIMENTS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem[0] != "_"
)

OWN = ("sae_jax", "experiments")


def main(argv: list[str]) -> None:
    """Builds the configuration from the flags and runs the experiment."""
    if len(argv) > 1:
        raise app.UsageError(f"settings are given as --name=value, not {argv[1]!r}")
    name = flags.FLAGS.experiment
    if name is None:
        raise app.UsageError(f"--experiment is one of {', '.join(EXPERIMENTS)}")
    experiment = load(name)
    values = {field.name: value(field.name) for field in fields(experiment.Config)}
    try:
        experiment.run(experiment.Config(**values))
    except (ValueError, OSError) as error:
        # What the project itself says of bad input is complete; the rest is a fault
        # of ours, and its traceback is needed.
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not any(last.is_relative_to(ROOT / own) for own in OWN):
            raise
        sys.exit(f"error: {error}")


def load(name: str) -> ModuleType:
    """The module of an experiment."""
    return importlib.import_module(f"experiments.{name}")


def define_flags(experiment: ModuleType) -> None:
    """One flag for every field of the experiment's configuration."""
    described = {}
    # From the base up: a subclass that only changes a default keeps the description.
    for base in reversed(experiment.Config.__mro__):
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            if typing.get_origin(hint) is typing.Annotated:
                described[name] = typing.get_args(hint)
    for field in fields(experiment.Config):
        kind, text = described[field.name]
        define(field.name, kind, field.default, text)


def define(name: str, kind: Any, default: Any, text: str) -> None:
    """A flag of the type that the field is annotated with."""
    if typing.get_origin(kind) is typing.Literal:
        flags.DEFINE_enum(name, default, list(typing.get_args(kind)), text)
    elif kind == tuple[str, ...]:
        flags.DEFINE_list(name, list(default), text)
    else:
        known = {
            str: flags.DEFINE_string,
            bool: flags.DEFINE_boolean,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
        }
        known[kind](name, default, text)


def value(name: str) -> Any:
    """What a flag was set to, lists as tuples."""
    given = flags.FLAGS[name].value
    return tuple(given) if isinstance(given, list) else given


def entry(argv: list[str]) -> None:
    """Finds the experiment, defines its flags, and hands over to absl."""
    flags.DEFINE_enum("experiment", None, EXPERIMENTS, "which experiment to run")
    joined = " ".join(argv).replace("--experiment ", "--experiment=").split()
    chosen = [a.split("=", 1)[1] for a in joined if a.startswith("--experiment=")]
    doc = __doc__ or ""
    if chosen and chosen[-1] in EXPERIMENTS:
        experiment = load(chosen[-1])
        define_flags(experiment)
        doc = experiment.__doc__ or ""
    else:
        for name in EXPERIMENTS:
            path = ROOT / "experiments" / f"{name}.py"
            doc += f"\n  {name:14} {path.read_text().split('.', 1)[0][3:]}"
    sys.modules["__main__"].__doc__ = doc
    logging.set_verbosity(logging.WARNING)  # of the libraries; --verbosity changes it
    app.run(main, argv=argv)


if __name__ == "__main__":
    entry(sys.argv)
