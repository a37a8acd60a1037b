"""On what devices a run trains: on one, over a mesh, or by `pmap`."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sae_jax import mesh
from sae_jax.model import SAE
from sae_jax.run import hosts
from sae_jax.share import WHOLE, Share
from sae_jax.training.ensemble import Ensemble
from sae_jax.training.recipe import Recipe

# Features of the SAEs that are computed at once on a GPU or TPU: small ones fill it
# together, and a large one does so alone, with codes that take memory. Not measured.
TOGETHER = 2**17

AXIS = "rows"  # of pmap; not `data`, which on a mesh is summed over by whom it concerns


class OneDevice:
    """The first device, by `jit`.

    Attributes:
      share: which rows of each batch this process brings.
      most: how many SAEs that are alike are computed at once; 0: see `at_once`.
    """

    share = WHOLE

    def __init__(self, most: int = 0):
        self.most = most

    def faults(self, sae: SAE, recipe: Recipe, batch: int) -> Iterator[str]:
        """What cannot be trained like this."""
        yield from ()

    def at_once(self, n: int, n_features: int) -> int:
        """How many of n SAEs that are alike are computed together.

        If nothing is asked for, one on a CPU; elsewhere as many as `TOGETHER` allows.
        """
        most = 1 if jax.default_backend() == "cpu" else TOGETHER // n_features
        fit = (i for i in range(1, n + 1) if n % i == 0 and i <= (self.most or most))
        return max(fit, default=1)

    def entered(self) -> AbstractContextManager:
        """Where states are made and steps are compiled."""
        return nullcontext()

    def like(self, shapes: Any, n_features: int, lead: int) -> Any:
        """Shapes of states, with the devices that their arrays are on; see `specs`."""
        return shapes

    def rows(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Activations, brought to where they are used."""
        return rows

    def sample(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Activations that a start is estimated from, those of all processes."""
        return rows

    def together(self, tree: Any) -> Any:
        """Arrays of a state on one device of this process."""
        return tree

    def read(self, tree: Any) -> Any:
        """Arrays of a state in the memory of the host."""
        return jax.device_get(tree)

    def program(self, ensemble: Ensemble) -> Any:
        """The step of `Ensemble.make_step`, ready to be lowered."""
        return jax.jit(ensemble.make_step(), donate_argnums=(1, 2))


ONE_DEVICE = OneDevice()


class OnMesh(OneDevice):
    """Devices in a mesh: rows spread over one axis, features over the other."""

    def __init__(self, devices: Mesh, most: int = 0):
        super().__init__(most)
        self._mesh = devices
        self.share = share_of(devices)

    def faults(self, sae: SAE, recipe: Recipe, batch: int) -> Iterator[str]:
        """Rows and features must be spread evenly."""
        at_once = batch // recipe.accumulate
        yield from mesh.misfits(self._mesh.shape, at_once, sae.n_features)

    def at_once(self, n: int, n_features: int) -> int:
        """Each device has as many as the others, or there is a fault."""
        n_parts = self._mesh.shape[mesh.MEMBER]
        if n % n_parts:
            raise ValueError(
                f"{n} SAEs that are alike cannot be spread evenly over mesh "
                f"{mesh.MEMBER}:{n_parts}."
            )
        return n_parts * super().at_once(n // n_parts, n_features)

    def entered(self) -> AbstractContextManager:
        """Inside, all arrays are spread over the mesh."""
        return jax.set_mesh(self._mesh)

    def like(self, shapes: Any, n_features: int, lead: int) -> Any:
        """Each array in parts."""
        with self.entered():
            return mesh.like(shapes, n_features, lead)

    def rows(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Each device gets the rows of its place on the axis of rows."""
        if hosts.several():
            return {site: self._of_all_processes(x) for site, x in rows.items()}
        return jax.device_put(dict(rows), NamedSharding(self._mesh, mesh.ROWS))

    def sample(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `OneDevice`."""
        return self.rows(rows)

    def _of_all_processes(self, x: Any) -> jax.Array:
        """Rows of which each process has its share; none are sent to another."""
        where = NamedSharding(self._mesh, mesh.ROWS)
        shape = self.share.count * x.shape[0], *x.shape[1:]
        first, parts = self.share.index * x.shape[0], []
        for device, index in where.addressable_devices_indices_map(shape).items():
            assert index is not None
            begin, end, _ = index[0].indices(shape[0])
            parts.append(jax.device_put(x[begin - first : end - first], device))
        return jax.make_array_from_single_device_arrays(shape, where, parts)

    def together(self, tree: Any) -> Any:
        """On the first device."""
        if hosts.several():
            return jax.tree.map(lambda x: x.addressable_data(0), self._everywhere(tree))
        return jax.device_put(tree, self._mesh.devices.flat[0])

    def read(self, tree: Any) -> Any:
        """See `OneDevice`."""
        return jax.device_get(self._everywhere(tree) if hosts.several() else tree)

    def _everywhere(self, tree: Any) -> Any:
        """All of it on every device, since a process sees none of other processes'."""
        whole = NamedSharding(self._mesh, mesh.WHOLE)
        return jax.jit(lambda tree: tree, out_shardings=whole)(tree)


def share_of(devices: Mesh) -> Share:
    """Which rows of a batch the devices of this process hold.

    Those of a process have to stand together on the axis of rows, as many of each.
    """
    axis = devices.axis_names.index(mesh.DATA)
    places: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(devices.devices):
        places.setdefault(device.process_index, set()).add(place[axis])
    own, n = places[jax.process_index()], devices.shape[mesh.DATA]
    index, count = min(own) // len(own), n // len(own)
    blocks = [set(range(i * len(own), (i + 1) * len(own))) for i in range(count)]
    if n % len(own) or any(one not in blocks for one in places.values()):
        raise ValueError(
            f"mesh {dict(devices.shape)} gives processes rows that do not stand "
            f"together: {places}. Make {mesh.DATA} a multiple of the processes, or "
            f"{mesh.FEATURE} one of each process's devices."
        )
    return Share(index, count)


class Pmap(OneDevice):
    """All devices, each with all parameters and its part of the rows, by `jax.pmap`.

    `OnMesh` with `{"data": n}` does the same and more; this is the older way to say it.
    """

    def __init__(self, most: int = 0) -> None:
        super().__init__(most)
        self._n = jax.device_count()

    def faults(self, sae: SAE, recipe: Recipe, batch: int) -> Iterator[str]:
        """A rule may not see more than its device's rows."""
        if hosts.several():
            yield "runner=pmap trains in one process; use --mesh with several."
        yield from mesh.misfits({mesh.DATA: self._n}, batch // recipe.accumulate, 1)
        name, state = sae.bound.rule.name, sae.shapes().state
        if sae.bound.rule.couples_batch or state:
            yield (
                f"runner=pmap cannot train {name}, which looks over whole batches or "
                f"remembers them: a device sees a part. Use --mesh=data:{self._n}."
            )
        if "key" in sae.bound.rule.needs:
            yield (
                f"runner=pmap cannot train {name}: all devices would draw the same "
                f"random numbers. Use --mesh=data:{self._n}."
            )

    def rows(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """With a first axis of devices."""
        return {s: x.reshape(self._n, -1, x.shape[-1]) for s, x in rows.items()}

    def together(self, tree: Any) -> Any:
        """On the first device; all have the same."""
        return jax.device_put(tree, jax.devices()[0])

    def program(self, ensemble: Ensemble) -> Any:
        """The same state on all devices; sums are taken over them."""
        step = ensemble.make_step(axis=AXIS)
        return jax.pmap(step, AXIS, in_axes=(None, None, None, 0), out_axes=None)
