"""Tables of named things, and the spec strings that pick from them.

A spec string is a name, alone or with literal keyword arguments:
`"topk"`, `"topk(k=32)"`, `"matryoshka(k=8.0, prefixes=[0.5, 1.0])"`. It is parsed
as Python syntax but never evaluated: only literals pass.
"""

import ast
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from sae_jax import checks

Item = TypeVar("Item")


class Table(Generic[Item]):
    """Names and what they stand for; a name is given once and never replaced."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, Item] = {}

    def register(self, name: str, item: Item) -> Item:
        """Adds `item` under `name` and gives it back."""
        if not name.isidentifier():
            raise ValueError(f"{self.kind} name {name!r} must be a Python identifier.")
        if name in self._items:
            raise ValueError(f"There is a {self.kind} {name!r} already; rename yours.")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> Item:
        if name not in self._items:
            raise ValueError(checks.unknown(self.kind, name, self._items))
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"<{self.kind}s: {', '.join(self)}>"


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Splits a spec string into its name and its literal keyword arguments."""
    form = "write name or name(argument=literal)"
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"Cannot read {text!r}: {form}.") from error
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ValueError(f"Cannot read {text!r}: {form}.")
    if tree.args or any(keyword.arg is None for keyword in tree.keywords):
        raise ValueError(f"Arguments in {text!r} need names: {form}.")
    arguments: dict[str, Any] = {}
    for keyword in tree.keywords:
        if keyword.arg in arguments:
            raise ValueError(f"{keyword.arg} stands twice in {text!r}.")
        try:
            arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{keyword.arg}={ast.unparse(keyword.value)} in {text!r} is not a "
                f"literal; write the value itself, such as 0.03125 for 1/32."
            ) from error
    return tree.func.id, arguments


def format_spec(name: str, arguments: dict[str, Any]) -> str:
    """Writes the spec string that `parse_spec` reads back."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
