"""How long a step would take a chip at its published best, and on which mesh.

Not an experiment, and not a measurement: the longer of computing and of moving memory,
then all that is sent, none of it hidden behind the rest, every link at full speed. What
moves is counted in passes over arrays, fitted to the bytes that the TPU's compiler
counts for steps at F = 131,072; PODS.md says how near they come.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments._chips import Chip
from experiments._sizing import FLOAT, Exchange, Split, Step, form

OVER_MATRIX = 20  # of encoder or decoder: products, projection, Adam, norms
OVER_CODES = {"dense": 16, "sparse": 22}  # of the pre-activations
OVER_SLOTS = 27  # of the decoder rows in all slots, taken one by one
FILLED = 0.85  # of the memory, at most: temporaries are known within a third


def operations(step: Step) -> int:
    """Of the matrix products of a device.

    A slot of sparse codes costs the same on every device, whoever has its feature.
    """
    slots, rows = form(step.sae).slots, step.b * step.recipe.accumulate
    product = 2 * rows * step.f * step.sae.d_in
    if not slots:
        return 5 * product
    return product + 4 * 2 * rows * slots * step.sae.d_in


def moved(step: Step) -> int:
    """Bytes that a device reads and writes."""
    slots, pieces = form(step.sae).slots, step.recipe.accumulate
    rows = step.b * pieces
    matrices = (OVER_MATRIX + 9 * (pieces - 1)) * step.matrix
    passes = OVER_CODES["sparse" if slots else "dense"]
    taken = OVER_SLOTS * FLOAT * rows * slots * step.sae.d_in
    return matrices + passes * pieces * step.codes + taken


def seconds(step: Step, chip: Chip, dtype: str) -> dict[str, float]:
    """Where the time of a step goes."""
    best = {"float32": chip.float32, "bfloat16": chip.bfloat16}[dtype]
    compute = operations(step) / best
    moving = moved(step) / chip.bandwidth
    sending = sum(e.sent / rate(e, step.split, chip) for e in step.exchanges())
    total = max(compute, moving) + sending
    return {"compute": compute, "moving": moving, "sending": sending, "seconds": total}


def rate(exchange: Exchange, split: Split, chip: Chip) -> float:
    """Bytes a second along an axis; neighbours along `feature` share a host."""
    reach = split.feature if exchange.axis == "feature" else split.data * split.feature
    if chip.in_host is None or chip.sends_far is None or reach <= chip.in_host:
        return chip.sends
    return chip.sends_far


def held(step: Step) -> int:
    """Bytes that a device needs."""
    return sum(step.state().values()) + step.rows() + passing(step)


def passing(step: Step) -> int:
    """Bytes of temporaries; gradients take the place of codes."""
    found = step.temporaries()
    return max(found["gradients"], found["codes"]) + found["exchange"]


def splits(step: Step, chips: int) -> Iterator[Step]:
    """The same step on every mesh of so many devices over which it spreads evenly."""
    for data in (n for n in range(1, chips + 1) if chips % n == 0):
        split = Split(data, chips // data)
        even = step.batch % (data * step.recipe.accumulate) == 0
        if even and step.sae.n_features % split.feature == 0:
            yield replace(step, split=split)


def fits(step: Step, chip: Chip) -> bool:
    """Whether a device has the memory."""
    return held(step) <= FILLED * chip.memory


def fastest(step: Step, chip: Chip, chips: int, dtype: str) -> Step | None:
    """The quickest of the meshes that fit."""
    fitting = [s for s in splits(step, chips) if fits(s, chip)]
    takes = {s: seconds(s, chip, dtype)["seconds"] for s in fitting}
    return min(fitting, key=lambda s: takes[s], default=None)


def grow(step: Step, chip: Chip, dtype: str) -> str:
    """Which axis is to be doubled, should there be twice the devices."""
    data, feature = step.split
    wider = {"data": Split(2 * data, feature), "feature": Split(data, 2 * feature)}
    there = {*splits(step, 2 * data * feature)}
    found = {axis: replace(step, split=split) for axis, split in wider.items()}
    takes = {
        axis: seconds(s, chip, dtype)["seconds"]
        for axis, s in found.items()
        if s in there and fits(s, chip)
    }
    return min(takes, key=lambda axis: takes[axis], default="neither")
