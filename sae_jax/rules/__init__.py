"""Sparsity rules, one a file. Importing this package registers every one of them."""

import importlib
import importlib.util
import pkgutil
import sys
import zlib
from pathlib import Path

from sae_jax.binding import BoundRule, parse
from sae_jax.contract import RULES, Rule, register

__all__ = ["RULES", "BoundRule", "Rule", "load_file", "parse", "register", "table"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def load_file(path: str | Path) -> None:
    """Runs a Python file of yours that registers rules of its own.

    The file becomes a module, so that loading it twice registers once.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"There is no file {file}; give a Python file with a rule.")
    name = f"sae_jax_user_rules.{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file; its name must end in .py.")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def table() -> str:
    """The rules as a Markdown table, as the README shows it."""
    lines = ["| rule | what decides | knob | source |", "|---|---|---|---|"]
    lines += [
        f"| `{rule.name}` | {rule.decides} | `{rule.knob}` | {rule.paper} |"
        for rule in (RULES[name] for name in RULES)
    ]
    return "\n".join(lines)
