"""Shares: what each of several processes reads of the batches that all train on.

Every process of a job opens the same stream with a share of its own. The shares of a
batch, one after another, are the batch that a single process would read, so what is
trained does not depend on how many processes there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# What a share's position has apart from those of other shares, each entry by name.
PLACES = "places"


@dataclass(frozen=True)
class Share:
    """Which part of each batch this process reads: part `index` of `count`."""

    index: int = 0
    count: int = 1

    def faults(self, **sizes: int) -> Iterator[str]:
        """What is wrong with it, and which of these numbers it does not divide."""
        if not 0 <= self.index < self.count:
            yield (
                f"share {self.index} of {self.count} is none; an index is at least 0 "
                f"and less than the count."
            )
            return
        for name, size in sizes.items():
            if size % self.count:
                yield (
                    f"{name}={size} cannot be shared evenly by {self.count} processes; "
                    f"give a multiple of {self.count}."
                )


WHOLE = Share()


def joined(positions: Sequence[Any]) -> Any:
    """The position of the whole stream, from those of all its shares at one batch.

    A stream takes it up with any number of shares. What every share knows must agree.
    """
    first = positions[0]
    common = [_common(position) for position in positions]
    for index, other in enumerate(common):
        if other != common[0]:
            raise ValueError(
                f"the shares stand at different batches or read different streams: the "
                f"first has {common[0]}, number {index} has {other}. Start all "
                f"processes with the same settings, files and versions"
            )
    if not isinstance(first, dict) or PLACES not in first:
        return first
    return first | {
        PLACES: {name: p for whole in positions for name, p in whole[PLACES].items()}
    }


def _common(position: Any) -> Any:
    """What has to be the same for all shares."""
    if not isinstance(position, dict) or PLACES not in position:
        return position
    return {name: value for name, value in position.items() if name != PLACES}
