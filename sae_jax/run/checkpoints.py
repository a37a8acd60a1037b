"""Checkpoints of a run: written in the background, whole or not at all.

Orbax writes them; nothing else imports it. Beside the arrays stands a JSON note (step,
place in the data) with a checksum of every array, taken on the device before writing
and compared after reading. So damage is found even where the files can still be read.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from sae_jax.run import hosts

FORMAT = "sae_jax.checkpoint.2"


class Restored(NamedTuple):
    """What a checkpoint held: `step` steps were done when it was written."""

    step: int
    state: Any
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one folder.

    Args:
        folder: Where they are; made if missing.
        keep: How many of the newest stay.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints leaves none; keep at least 1.")
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
        )

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Begins to write; returns when the arrays have been copied off the device.

        A step that is there already is not written again.
        """
        if step in self._manager.all_steps():
            return
        notes = {"format": FORMAT, "checksums": checksums(state), **notes}
        notes = {"notes": notes, "checksum": _of_text(notes)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
            ),
            force=True,
        )

    def wait(self) -> None:
        """Returns when everything begun is on disk."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / str(step)

    def restore(self, like: Any, report: Any = print) -> Restored | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Args:
            like: The state's shapes, types and shardings (`jax.eval_shape` will do);
                the number of devices may be another one than when it was written.
            report: Called with a sentence for each damaged checkpoint.
        """
        for step in reversed(self.steps()):
            restored = None
            try:
                restored = self._read(step, like)
            except Exception as error:  # whatever the libraries below make of damage
                first = [*str(error).strip().splitlines(), type(error).__name__][0]
                report(
                    f"The checkpoint {self.path(step)} cannot be used: {first[:200]}"
                )
            if not hosts.all_agree(restored is not None):
                continue
            for newer in self.steps():
                if newer > step:  # would be in the way when this step comes again
                    self._manager.delete(newer)
            return restored
        if self.steps():
            raise ValueError(
                f"None of the checkpoints in {self.folder} can be used. Remove the "
                f"folder to begin anew, or restore it from a copy."
            )
        return None

    def _read(self, step: int, like: Any) -> Restored:
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(_placed, like)),
                notes=ocp.args.JsonRestore(),
            ),
        )
        notes = read.notes["notes"]
        if _of_text(notes) != read.notes["checksum"]:
            raise ValueError("its notes are damaged")
        if notes.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        then, now = notes.pop("checksums"), checksums(read.state)
        wrong = [name for name in now if now[name] != then.get(name)]
        if wrong or len(then) != len(now):
            raise ValueError(
                f"checksums differ at {', '.join(wrong) or 'other arrays'}"
            )
        return Restored(step, read.state, notes)

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        self._manager.close()


def checksums(tree: Any) -> dict[str, int]:
    """A number for each array, which changes if any bit of it does."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    numbers = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves
    ]
    return {name: int(n) for name, n in zip(names, numbers, strict=True)}


def _placed(like: Any) -> jax.ShapeDtypeStruct:
    """With a sharding; without, Orbax would ask for the devices of the saved one."""
    sharding = getattr(like, "sharding", None)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding or here)


def _of_text(notes: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(notes, sort_keys=True).encode())


@jax.jit
def _checksums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(x: Array) -> UInt32[Array, ""]:
    """The words of x, each times an odd number of its own, summed modulo 2^32.

    A sum, so that it does not depend on how x is spread over devices; times an odd
    number, no change of a single word is lost.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    word = np.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index + along * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return (words * (2 * index + 1)).sum(dtype=jnp.uint32)
