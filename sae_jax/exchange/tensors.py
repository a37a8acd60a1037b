"""Arrays in files that others wrote: looked at before anything is allocated.

A file becomes a mapping from names to `Held`: shape and type are known, the values are
read when asked for. What a header claims must fit in the file, so memory is bounded by
what lies on disk. Nothing is executed: a pickle may name what PyTorch needs to put
tensors together and nothing else, and is read by PyTorch's weights-only loader.
"""

import math
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

MIB = 2**20
# Weights do not become eight times smaller by compression; zeros do, by a thousand.
INFLATES = 8
MOST_PICKLED = 16 * MIB  # of names, sizes and places; the numbers lie beside it

FLOATS = {"F16", "BF16", "F32", "F64"}
BUILDERS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {name}Storage"
        for name in "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()
    ),
}


class Held(NamedTuple):
    """One array of a file: its shape, whether it holds floats, and its values."""

    shape: tuple[int, ...]
    floats: bool
    get: Callable[[], np.ndarray]


@contextmanager
def told(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turns what a reader says of a bad file into the one error of this package."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, MemoryError, *others)
    try:
        yield
    except kinds as error:
        raise ValueError(
            f"{path} cannot be read: {str(error).strip() or type(error).__name__}\n"
            f"It is damaged, incomplete or of another kind; fetch it again."
        ) from None


def of_safetensors(path: Path) -> dict[str, Held]:
    """The arrays of a .safetensors file; its library checks that they fit in it."""

    def get(name: str) -> np.ndarray:
        with told(path, SafetensorError), safe_open(path, "numpy") as file:
            return file.get_tensor(name)

    held = {}
    with told(path, SafetensorError), safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            held[name] = Held(shape, dtype in FLOATS, partial(get, name))
    return held


def of_npz(path: Path) -> dict[str, Held]:
    """The arrays of NumPy's archive, objects refused."""

    def get(member: str) -> np.ndarray:
        with (
            told(path, Exception),
            zipfile.ZipFile(path) as archive,
            archive.open(member) as file,
        ):
            return np.lib.format.read_array(file, allow_pickle=False)

    held = {}
    with told(path, Exception), zipfile.ZipFile(path) as archive:
        no_bomb(path, archive)
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                raise ValueError(f"{info.filename!r} in it is no array of NumPy's.")
            with archive.open(info) as file:
                shape, dtype = npy_header(file)
                claimed = file.tell() + math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise ValueError(f"{info.filename!r} in it holds objects, not numbers.")
            if claimed != info.file_size:
                raise ValueError(
                    f"{info.filename!r} in it claims {dtype}{list(shape)}, and holds "
                    f"{info.file_size} bytes."
                )
            name = info.filename.removesuffix(".npy")
            held[name] = Held(shape, dtype.kind == "f", partial(get, info.filename))
    return held


def npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in NumPy's own format."""
    form = np.lib.format
    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    magic = form.read_magic(file)
    if magic not in readers:
        raise ValueError(f"its version of NumPy's format is {magic}.")
    shape, _, dtype = readers[magic](file)
    return shape, dtype


def of_pickle(path: Path) -> tuple[dict[str, Held], dict[str, Any]]:
    """The tensors of a .pt file, and what lies beside them."""
    with told(path, Exception), zipfile.ZipFile(path) as archive:
        no_bomb(path, archive)
        no_code(archive)
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} is a file of PyTorch's, which is needed to read it: "
            f"pip install 'sae_jax[torch]'."
        ) from None

    with told(path, Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, Mapping) or not all(isinstance(n, str) for n in found):
            raise ValueError("it holds something other than tensors by name.")
        held, beside = {}, {}
        for name, value in found.items():
            if not isinstance(value, torch.Tensor):
                beside[name] = value
                continue
            shape, size = tuple(value.shape), value.element_size()
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise ValueError(f"{name} is no ordinary tensor.")
            if math.prod(shape) * size > path.stat().st_size:
                raise ValueError(
                    f"{name} claims {list(shape)}, more than the file holds."
                )
            held[name] = Held(
                shape, value.is_floating_point(), partial(of_torch, value)
            )
    return held, beside


def of_torch(tensor: Any) -> np.ndarray:
    """The values of a tensor; of bfloat16, which NumPy does not take, in float32."""
    narrow = str(tensor.dtype) == "torch.bfloat16"
    return (tensor.detach().float() if narrow else tensor.detach()).numpy()


def no_bomb(path: Path, archive: zipfile.ZipFile) -> None:
    """An archive may not grow out of proportion, nor name a member twice."""
    members = archive.infolist()
    inflated = sum(member.file_size for member in members)
    if inflated > MIB + INFLATES * path.stat().st_size:
        raise ValueError(f"it would grow to {inflated} bytes, as no weights do.")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("it has two members of one name.")


def no_code(archive: zipfile.ZipFile) -> None:
    """The pickle inside may name nothing but what puts tensors together."""
    pickles = [m for m in archive.infolist() if m.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MOST_PICKLED:
        raise ValueError("it is not as PyTorch saves tensors, since 2020.")
    for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
        named = operation.name in ("GLOBAL", "INST")
        if named and argument not in BUILDERS:
            raise ValueError(
                f"its pickle names {str(argument).replace(' ', '.')!r}, which could "
                f"run code; only plain tensors are read."
            )
        if operation.name in (
            "STACK_GLOBAL",
            "EXT1",
            "EXT2",
            "EXT4",
            "OBJ",
            "NEWOBJ_EX",
        ):
            raise ValueError("its pickle names things in a way that PyTorch does not.")
