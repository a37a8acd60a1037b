"""Files that are broken or were made to do harm: one clear error, and nothing else."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import load
from tests.test_exchange import RECORDED, folder_of

CASES = {
    "saelens": "saelens/topk",
    "saelens_old": "saelens/old_layout_topk",
    "sparsify": "sparsify/topk",
    "gemma_scope": "gemma_scope/residual",
    "gemma_scope_2": "gemma_scope/gemma_3",
    "dictionary_learning": "dictionary_learning/BatchTopKSAE",
    "openai": "openai/TopK",
}
PICKLED = {"dictionary_learning", "openai"}


def copied(name: str, to: Path) -> Path:
    """The recorded folder, to be changed."""
    if name in PICKLED:
        pytest.importorskip("torch")
    folder = folder_of(RECORDED / CASES[name])
    keep = folder.relative_to(RECORDED / CASES[name])
    ignored = shutil.ignore_patterns("expected.npz")
    shutil.copytree(folder, to / "copy" / keep, ignore=ignored)
    return to / "copy" / keep


def weights_of(folder: Path) -> Path:
    """The file that holds the arrays."""
    (found,) = [
        f for f in folder.iterdir() if f.suffix in {".safetensors", ".pt", ".npz"}
    ]
    return found


def told(folder: Path, reason: str) -> str:
    """The error names the file and the reason, in little time and memory."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason) as caught:
            load(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert time.monotonic() - began < 20
    assert "Traceback" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("cut", [0, 1, 7, 100, 0.5, -1])
def test_a_truncated_file(name, cut, tmp_path):
    folder = copied(name, tmp_path)
    path = weights_of(folder)
    data = path.read_bytes()
    size = int(len(data) * cut) if isinstance(cut, float) else cut
    path.write_bytes(data[:size])
    told(folder, "cannot be read")


@pytest.mark.parametrize("name", [n for n in CASES if n not in PICKLED])
def test_arrays_that_do_not_fit_are_all_named(name, tmp_path):
    folder = copied(name, tmp_path)
    path = weights_of(folder)
    archive = path.suffix == ".npz"
    arrays = dict(np.load(path)) if archive else load_file(path)
    bias = next(n for n in arrays if n in ("b_enc", "encoder.bias"))
    arrays["b_dec"] = arrays["b_dec"][:-1]
    arrays[bias] = arrays[bias].astype(np.int32)
    arrays["../../spy"] = np.zeros(1, np.float32)
    np.savez(path, **arrays) if archive else save_file(arrays, path)
    said = told(folder, "is foreign")
    assert "b_dec has shape [7]; needed are floats of [8]" in said
    assert f"{bias} has shape [16]; needed are floats" in said
    assert "'../../spy' is foreign" in said


@pytest.mark.parametrize("name", [n for n in CASES if n not in PICKLED])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(name, value, tmp_path):
    folder = copied(name, tmp_path)
    path = weights_of(folder)
    archive = path.suffix == ".npz"
    arrays = dict(np.load(path)) if archive else load_file(path)
    arrays["b_dec"] = arrays["b_dec"].copy()
    arrays["b_dec"][3] = value
    np.savez(path, **arrays) if archive else save_file(arrays, path)
    told(folder, "b_dec has NaN or infinite values")


@pytest.mark.parametrize("name", list(CASES))
def test_a_missing_array(name, tmp_path):
    folder = copied(name, tmp_path)
    path = weights_of(folder)
    if name in PICKLED:
        torch = pytest.importorskip("torch")
        held = torch.load(path, weights_only=True)
        del held["encoder.weight"]
        torch.save(held, path)
    elif path.suffix == ".npz":
        arrays = dict(np.load(path))
        del arrays["W_enc"]
        np.savez(path, **arrays)
    else:
        arrays = load_file(path)
        del arrays[next(n for n in arrays if n.lower() in ("w_enc", "encoder.weight"))]
        save_file(arrays, path)
    told(folder, r"(?i)(w_enc|encoder\.weight) is missing")


def edited(folder: Path, name: str, **changes):
    path = folder / name
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | changes))


DESCRIPTIONS = {
    "unknown": (
        "saelens",
        {"architecture": "tpk"},
        r"Unknown architecture 'tpk'\. Did",
    ),
    "list": ("saelens", {"architecture": ["topk"]}, "Unknown architecture"),
    "abstopk": ("saelens", {"architecture": "abstopk"}, "its codes are negative too"),
    "temporal": ("saelens", {"architecture": "temporal"}, "whole sequences"),
    "no k": ("saelens", {"k": None}, "k=None must be an integer"),
    "k": ("saelens", {"k": "4); evil("}, "must be an integer"),
    "k too large": ("saelens", {"k": 10**9}, "at most n_features=16"),
    "d_in": ("saelens", {"d_in": 9}, r"W_enc has shape \[8, 16\]; needed.*\[9, 16\]"),
    "huge": ("saelens", {"d_sae": 10**15}, r"needed are floats of \[1000000000000000"),
    "bool": ("saelens", {"d_in": True}, "d_in is True; needed is int"),
    "centre": ("saelens", {"apply_b_dec_to_input": 1}, "is 1; needed is bool"),
    "rescale": (
        "saelens",
        {"normalize_activations": "constant_norm_rescale"},
        "scales each row to one norm",
    ),
    "whitening": (
        "saelens",
        {"normalize_activations": "covariance_whitening"},
        "save_inference_model",
    ),
    "other": ("saelens", {"normalize_activations": "x"}, "known are"),
    "metadata": ("saelens", {"metadata": [1]}, "metadata is"),
    "tanh": ("saelens_old", {"activation_fn_str": "tanh-relu"}, "Unknown activation"),
    "groups": ("sparsify", {"activation": "groupmax"}, "Unknown activation 'groupmax'"),
    "skip": ("sparsify", {"skip_connection": True}, "a linear path"),
    "k float": ("sparsify", {"k": 4.5}, "k is 4.5; needed is int"),
    "trainer": ("dictionary_learning", {"trainer": 3}, "trainer is 3"),
    "class": (
        "dictionary_learning",
        {"trainer": {"dict_class": "AutoEncodr"}},
        "Did you mean 'AutoEncoder'",
    ),
    "size": (
        "dictionary_learning",
        {"trainer": {"dict_class": "BatchTopKSAE", "dict_size": "x"}},
        "dict_size is 'x'; needed is int",
    ),
}


@pytest.mark.parametrize("case", list(DESCRIPTIONS))
def test_a_description_that_cannot_be_used(case, tmp_path):
    name, changes, reason = DESCRIPTIONS[case]
    folder = copied(name, tmp_path)
    file = "config.json" if name == "dictionary_learning" else "cfg.json"
    edited(folder, file, **changes)
    told(folder, reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("[1]", "holds a list, not an object"),
        ('{"architecture": NaN}', "NaN is no number of JSON"),
        ('{"architecture": ' + "[" * 10**5, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        ('{"k": ' + "9" * 5000 + "}", "cannot be read"),
        (" " * (9 * 2**20), "too large for a description"),
    ],
)
def test_a_description_that_is_none(text, reason, tmp_path):
    folder = copied("saelens", tmp_path)
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "cfg.json").write_bytes(data)
    told(folder, reason)


# Harm ---------------------------------------------------------------------------------


class Bomb:
    """A pickle of this runs a command wherever it is read carelessly."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", sorted(PICKLED))
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("how", ["bare", "in an archive", "among tensors"])
def test_a_pickle_with_code_in_it_is_not_run(name, protocol, how, tmp_path):
    torch = pytest.importorskip("torch")
    folder, mark = copied(name, tmp_path), tmp_path / "mark"
    path = weights_of(folder)
    harm = Bomb(mark)
    if how == "bare":
        path.write_bytes(pickle.dumps(harm, protocol))
    elif how == "in an archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(harm, protocol))
            archive.writestr("archive/version", "3\n")
    else:
        held = torch.load(path, weights_only=True)
        held["b_dec"] = harm
        torch.save(held, path, pickle_protocol=max(protocol, 2))
    told(folder, "cannot be read")
    assert not mark.exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    folder, mark = copied("gemma_scope", tmp_path), tmp_path / "mark"
    path = weights_of(folder)
    arrays = dict(np.load(path)) | {"b_dec": np.array([Bomb(mark)] * 8, object)}
    np.savez(path, **arrays)
    told(folder, "holds objects")
    assert not mark.exists()


def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """NumPy's format with a header of one's own."""
    made = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(made, header)
    return made.getvalue() + data


def test_a_zip_bomb_is_not_blown_up(tmp_path):
    folder = copied("gemma_scope", tmp_path)
    path = weights_of(folder)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("W_enc.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy((2**13, 2**13)))
        for _ in range(256):  # 256 MiB of zeros in some hundred KiB
            file.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    told(folder, "would grow to 2684")


@pytest.mark.parametrize("shape", [(2**40, 2**20), (10**30,), (-3,), (8, 16, 2**60)])
def test_a_header_that_claims_too_much(shape, tmp_path):
    folder = copied("gemma_scope", tmp_path)
    path = weights_of(folder)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", npy(shape, bytes(512)))
    told(folder, "claims|cannot be read")


@pytest.mark.parametrize("size", [2**63, 2**40, 10**12])
def test_a_header_of_safetensors_that_claims_too_much(size, tmp_path):
    folder = copied("saelens", tmp_path)
    path = weights_of(folder)
    header = {"W_enc": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    told(folder, "cannot be read")
    path.write_bytes(struct.pack("<Q", size % 2**64) + text)
    told(folder, "cannot be read")


def test_a_tensor_that_claims_more_than_its_file_holds(tmp_path):
    torch = pytest.importorskip("torch")
    folder = copied("dictionary_learning", tmp_path)
    path = weights_of(folder)
    held = torch.load(path, weights_only=True)
    held["b_dec"] = torch.zeros(1).expand(10**12)  # one number, a trillion times
    torch.save(held, path)
    told(folder, "more than the file holds")


def test_two_members_of_one_name(tmp_path):
    folder = copied("gemma_scope", tmp_path)
    path = weights_of(folder)
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(path, "a") as more,
    ):
        more.writestr("W_enc.npy", npy((2,), bytes(8)))
    told(folder, "two members of one name")


@pytest.mark.parametrize(
    "name",
    ["../x/y", "x/../../y", "a/b/../../../etc", "/etc/passwd", "~/x/y", "a//b", "."],
)
def test_a_name_on_the_hub_does_not_leave_it(name, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"no folder or file|no SAE in a known"):
        load(name)


# Mutations ----------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, half of them where headers are; an end cut off; a piece moved."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(4)
    if kind <= 1:
        new = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            edge = min(len(data), 400)
            places = (
                rng.randrange(len(data)),
                rng.randrange(edge),
                len(data) - 1 - rng.randrange(edge),
            )
            new[rng.choice(places)] ^= 1 << rng.randrange(8)
        return bytes(new)
    if kind == 2:
        return data[:at]
    to = rng.randrange(len(data) + 1)
    return data[:to] + data[at : min(end, at + 300)] + data[to:]


def fuzzed(name: str, n: int, tmp_path: Path) -> tuple[int, int]:
    """How many of n damaged copies load, and how many are refused."""
    folder, rng = copied(name, tmp_path), random.Random(f"{name} {n}")
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    names = [weights_of(folder).name, *files]
    loaded = refused = 0
    for _ in range(n):
        chosen = rng.choice(names)
        (folder / chosen).write_bytes(mutated(files[chosen], rng))
        try:
            read = load(folder)
        except ValueError:
            refused += 1
        else:
            loaded += 1
            assert (read.sae.d_in, read.sae.n_features) == (8, 16)
            for part in read.variables.params.values():
                assert np.isfinite(np.asarray(part)).all()
        (folder / chosen).write_bytes(files[chosen])
    return loaded, refused


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("name", list(CASES))
def test_damage_is_refused_or_does_no_harm(name, tmp_path):
    loaded, refused = fuzzed(name, 100, tmp_path)
    assert loaded + refused == 100
    assert refused > 20


@pytest.mark.slow
@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("name", list(CASES))
def test_much_damage_is_refused_or_does_no_harm(name, tmp_path):
    loaded, refused = fuzzed(name, 2000, tmp_path)
    print(f"{name}: {loaded} loaded, {refused} refused")
    assert refused > 400


def test_nothing_of_a_bad_file_is_kept_open(tmp_path):
    """On some systems a file that is open cannot be replaced."""
    folder = copied("saelens", tmp_path)
    sae_jax.load(folder)
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc here")
    opened = {os.readlink(f) for f in descriptors.iterdir() if f.exists()}
    assert not any(str(tmp_path) in path for path in opened)
