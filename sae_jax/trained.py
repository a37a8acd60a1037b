"""A trained SAE: description, arrays, and where it came from; saved and loaded.

On disk it is a folder of two files. `sae.safetensors` holds every array, named
`params.W_enc`, `state.threshold` and so on; `sae.json` the description (rule,
arguments, input treatment, sizes), `about` (site, language model, data, recipe), and
a checksum of the arrays. Nothing in it is executed or unpickled; a rule of the user's
own has to be registered, by importing or `load_file`, before its SAE is loaded.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sae_jax import checks, codes, formats
from sae_jax.architecture import Architecture
from sae_jax.model import SAE
from sae_jax.variables import Output, Variables
from sae_jax.whole_files import write_folder

FORMAT = "sae_jax.sae.2"
OWN = "sae_jax"
ARRAYS, DESCRIPTION = "sae.safetensors", "sae.json"
FOREIGN_DESCRIPTION = "cfg.json"  # beside arrays of the same name, in sparsify's format


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedSAE:
    """An SAE together with its arrays.

    Attributes:
      sae: the description; its pure functions take `variables`.
      variables: the arrays.
      about: provenance, in plain values.
      history: metrics of the training that made it, if it was in this process.
    """

    sae: SAE
    variables: Variables
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __call__(
        self,
        x: Float[Any, "*batch D_in"],
        *,
        grad_x: Float[Any, "*batch D_in"] | None = None,
    ) -> tuple[Float[Array, "*batch D_out"], Float[Array, "*batch F"]]:
        """Reconstruction and dense codes of rows, in any number of leading axes.

        `x` may be an array of NumPy or PyTorch; what comes back is JAX's. The
        reconstruction has the type of `x`, codes have that of the SAE. `grad_x` is the
        gradient of the model's loss there, for rules that look at it.
        """
        x_hat, active = self._apply(self.variables, *_rows(x, grad_x))
        return _like(x, x_hat), _like(x, codes.to_dense(active))

    def encode(
        self,
        x: Float[Any, "*batch D_in"],
        *,
        grad_x: Float[Any, "*batch D_in"] | None = None,
    ) -> Float[Array, "*batch F"]:
        """Dense codes; `sae.encode` gives them sparse where the rule does."""
        active = self._encode(self.variables, *_rows(x, grad_x))
        return _like(x, codes.to_dense(active))

    def decode(
        self,
        active: Float[Any, "*batch F"],
        *,
        like: Float[Any, "*batch D_out"] | None = None,
    ) -> Float[Array, "*batch D_out"]:
        """The reconstruction of dense codes; `like` as in `SAE.decode`."""
        rows = jnp.asarray(rows_of("active", active))
        checks.rows("active", rows, self.sae.n_features)
        if like is not None:
            like = jnp.asarray(rows_of("like", like))
        return _like(active, self.sae.decode(self.variables, rows, like=like))

    @cached_property
    def _apply(self) -> Callable[..., Output]:
        return jax.jit(lambda variables, x, g: self.sae.apply(variables, x, grad_x=g))

    @cached_property
    def _encode(self) -> Callable[..., codes.Codes]:
        return jax.jit(lambda variables, x, g: self.sae.encode(variables, x, grad_x=g))

    def save(self, folder: str | Path, format: str = OWN) -> Path:
        """Writes the folder, whole or not at all; an SAE that is there is replaced.

        `format` may be that of another library, such as "saelens", for SAEs that it
        can say; see `exchange`. A kill at the moment of replacing leaves the old one
        in NAME.replaced.
        """
        known = formats.writable(format)
        assert known.write is not None  # writable looked
        return write_folder(folder, known.files, partial(known.write, self))

    def provenance(self) -> dict[str, Any]:
        """What it is and where it came from, in plain values, for any format.

        `configuration` is a checksum of the description and `about`, scores apart: it
        tells whether two SAEs were made alike.
        """
        facts = {"sae": describe(self.sae), "about": self.about}
        made_by = {n: v for n, v in self.about.items() if n != "scores"}
        try:
            json.dumps(facts, allow_nan=False)
            text = json.dumps(facts | {"about": made_by}, sort_keys=True)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"about cannot be saved: {error}; give plain, finite values."
            ) from None
        checksum = hashlib.sha256(text.encode()).hexdigest()
        return {"sae_jax": version("sae_jax"), **facts, "configuration": checksum}


def write(trained: TrainedSAE, folder: Path) -> None:
    """Fills a folder with our own format."""
    facts = trained.provenance()
    save_file(to_arrays(trained.variables), folder / ARRAYS)
    facts = {"format": FORMAT, **facts, "sha256": _checksum(folder / ARRAYS)}
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=1) + "\n")


def read(place: formats.Place) -> TrainedSAE:
    """Reads what `write` wrote."""
    folder = place.folder
    for name in (DESCRIPTION, ARRAYS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; a saved SAE is a folder of {DESCRIPTION} "
                f"and {ARRAYS}."
            )
    try:
        text = (folder / DESCRIPTION).read_text()
        found = json.loads(text, parse_constant=_refuse)
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
        if not isinstance(found["about"], dict):
            raise ValueError("about is not an object")
        sae = SAE(**found["sae"])
        shapes, checksum = sae.shapes(), found["sha256"]
    except KeyError as error:
        raise ValueError(f"{folder / DESCRIPTION} has no {error}.") from None
    # Too deep a nesting, and numbers that no array can have for a size, among them.
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{folder / DESCRIPTION} cannot be used: {error}\n(A rule of your own is "
            f"registered first: sae_jax.load_file, or --rule_files.)"
        ) from None
    if _checksum(folder / ARRAYS) != checksum:
        raise ValueError(
            f"{folder / ARRAYS} is damaged, or belongs to another {DESCRIPTION}: its "
            f"checksum differs."
        )
    try:
        arrays = load_file(folder / ARRAYS)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder / ARRAYS} cannot be read: {error}") from None
    variables = from_arrays(shapes, arrays, folder / ARRAYS)
    return TrainedSAE(sae, variables, found["about"])


def describe(sae: SAE) -> dict[str, Any]:
    """The fields of the description, in plain values."""
    fields = [field.name for field in dataclasses.fields(Architecture)]
    values = {name: getattr(sae, name) for name in fields} | {"rule": sae.bound.spec}
    return {n: v.item() if isinstance(v, np.generic) else v for n, v in values.items()}


def to_arrays(variables: Variables) -> dict[str, np.ndarray]:
    """All arrays by name."""
    return {
        f"{part}.{name}": np.asarray(array, order="C")
        for part, held in jax.device_get(variables)._asdict().items()
        for name, array in held.items()
    }


def from_arrays(
    shapes: Variables, arrays: dict[str, np.ndarray], source: Path
) -> Variables:
    """Puts arrays back, if they are of these shapes, all of them and no other."""
    needed = {
        f"{part}.{name}": array
        for part, held in shapes._asdict().items()
        for name, array in held.items()
    }
    faults = [f"{name} is missing." for name in sorted(needed.keys() - arrays.keys())]
    faults += [f"{name!r} is foreign." for name in sorted(arrays.keys() - needed)]
    for name in sorted(needed.keys() & arrays.keys()):
        given, want = arrays[name], needed[name]
        if given.shape != want.shape or given.dtype != want.dtype:
            faults.append(
                f"{name} is {given.dtype}{list(given.shape)}, "
                f"needed is {want.dtype}{list(want.shape)}."
            )
    checks.raise_all(f"{source}: {fault}" for fault in faults)
    parts: dict[str, dict[str, Array]] = {name: {} for name in Variables._fields}
    for name in needed:
        part, own = name.split(".", 1)
        parts[part][own] = jnp.asarray(arrays[name])
    return Variables(**parts)


def rows_of(name: str, array: Any) -> Any:
    """Any array (of PyTorch too) as rows, all leading axes in one."""
    if hasattr(array, "detach"):
        # By way of JAX, since NumPy takes no bfloat16 from PyTorch.
        array = np.asarray(jnp.from_dlpack(array.detach().cpu().contiguous()))
    shape = getattr(array, "shape", None)
    if not shape or not shape[-1]:
        given = f"a {type(array).__name__}" if shape is None else f"of shape {shape}"
        raise ValueError(f"{name} is {given}; give an array of shape [..., width].")
    return array.reshape(-1, shape[-1])


def _rows(x: Any, grad_x: Any) -> tuple[Array, Array | None]:
    rows = jnp.asarray(rows_of("x", x))
    return rows, None if grad_x is None else jnp.asarray(rows_of("grad_x", grad_x))


def _like(x: Any, rows: Array) -> Array:
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


formats.register(
    formats.Format(
        name=OWN,
        holds=f"a folder of {DESCRIPTION} and {ARRAYS}",
        recognises=lambda place: (
            DESCRIPTION in place.given
            or (ARRAYS in place.given and not place.has(FOREIGN_DESCRIPTION))
        ),
        read=read,
        write=write,
        files=frozenset({ARRAYS, DESCRIPTION}),
    )
)
