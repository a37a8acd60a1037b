"""The progress bar: tokens per second, time left, and how training goes."""

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar over the rows of activations, which are tokens of text.

    Where several SAEs are trained, each refresh shows the next one of them.
    """

    def __init__(self, rows: int, done: int, *, show: bool = True):
        seen = sys.stderr.isatty()
        self._bar = tqdm(
            total=rows,
            initial=done,
            unit=" tokens",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5 if seen else 10,
            desc="train",
            disable=not show,
        )
        self._turn = 0

    def step(self, rows: int) -> None:
        """One more step, of this many rows."""
        self._bar.update(rows)

    def show(self, metrics: dict[str, dict[str, Any]]) -> None:
        """The newest metrics of each SAE."""
        names = list(metrics)
        name = names[self._turn % len(names)]
        self._turn += 1
        now = metrics[name]
        text = f"loss {now['loss']:.4g}, L0 {now['l0']:.1f}, dead {now['dead']:.0f}"
        title = f"{name}: " if len(names) > 1 else ""
        self._bar.set_postfix_str(title + text, refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the last state of the bar on the screen."""
        self._bar.close()
