"""The saved SAE: exact, whole or refused; and calling one on arrays of any kind."""

import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import RULES, SAE, TrainedSAE, load, to_dense
from sae_jax.binding import bind
from sae_jax.trained import ARRAYS, DESCRIPTION, to_arrays
from tests.contract import build, rows, same

OPTIONS = {
    "none": {},
    "standardise": {"treatment": "standardise"},
    "scale": {"treatment": "scale", "b_dec_start": "mean"},
    "bfloat16": {"dtype": "bfloat16", "centre": False, "encoder_bias": True},
    "transcoder": {"d_out": 12, "treatment": "scale"},
}
ABOUT = {"site": "resid_post.3", "steps": 7, "recipe": {"lr": 3e-4, "clip": None}}


def example(rule):
    return bind(RULES[rule], RULES[rule].example)


def made(rule="relu", **options):
    return TrainedSAE(*build(example(rule), **options), ABOUT)


@partial(jax.jit, static_argnums=0)
def applied(sae, variables, x):
    return sae.apply(variables, x)


def same_sae(a, b):
    assert a.sae == b.sae
    assert a.variables._fields == b.variables._fields
    for name, array in to_arrays(a.variables).items():
        other = to_arrays(b.variables)[name]
        assert array.dtype == other.dtype, name
        assert array.tobytes() == other.tobytes(), name
    assert to_arrays(a.variables).keys() == to_arrays(b.variables).keys()


def cases():
    for rule in RULES:
        for name, options in OPTIONS.items():
            if "d_out" in options and "autoencoder" in RULES[rule].needs:
                continue
            yield pytest.param(rule, options, id=f"{rule}-{name}")


def transcoder(rule, d_out, **options):
    sae = SAE(16, 64, rule=example(rule), d_out=d_out, **options)
    samples = {"sample": rows(1), "target_sample": rows(2, width=d_out)}
    return TrainedSAE(sae, sae.init(jax.random.key(1), **samples), ABOUT)


# Saving and loading -------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "options"), list(cases()))
def test_what_is_loaded_is_what_was_saved(rule, options, tmp_path):
    one = transcoder(rule, **options) if "d_out" in options else made(rule, **options)
    folder = one.save(tmp_path / "sae")
    again = load(str(folder))
    same_sae(one, again)
    assert again.about == ABOUT
    assert again.history == []
    assert sorted(f.name for f in folder.iterdir()) == [DESCRIPTION, ARRAYS]
    assert [f.name for f in tmp_path.iterdir()] == ["sae"]
    before = applied(one.sae, one.variables, rows())
    after = applied(again.sae, again.variables, rows())
    assert to_dense(before.codes).any()
    same(before, after)


@pytest.mark.parametrize("rule", list(RULES))
def test_float64_is_saved_exactly(rule, x64, tmp_path):
    sae = SAE(16, 64, rule=example(rule), dtype="float64", treatment="scale")
    one = TrainedSAE(sae, sae.init(jax.random.key(1), sample=rows(1)))
    assert one.variables.params["W_dec"].dtype == jnp.float64
    same_sae(one, load(one.save(tmp_path / "sae")))


@pytest.mark.parametrize("rule", list(RULES))
def test_float32_saved_without_x64_loads_with_it(rule, tmp_path):
    """Memory that a rule makes of the default type would be refused there."""
    one = made(rule)
    one.save(tmp_path / "sae")
    with jax.enable_x64(True):
        same_sae(one, load(tmp_path / "sae"))


def test_float64_asks_for_x64(tmp_path):
    with jax.enable_x64(True):
        sae = SAE(16, 64, rule="relu", dtype="float64")
        TrainedSAE(sae, sae.init(jax.random.key(1))).save(tmp_path / "sae")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        load(tmp_path / "sae")


@pytest.mark.usefixtures("as_users")
def test_sizes_from_numpy_are_saved_as_numbers(tmp_path):
    sae = SAE(np.int64(16), np.int32(64), rule="relu")
    TrainedSAE(sae, sae.init(jax.random.key(0))).save(tmp_path / "sae")
    assert load(tmp_path / "sae").sae == SAE(16, 64, rule="relu")


def test_a_saved_sae_is_replaced_whole(tmp_path):
    made("gated").save(tmp_path / "sae")
    second = dataclasses.replace(made("topk"), about={"second": True})
    second.save(tmp_path / "sae")
    same_sae(load(tmp_path / "sae"), second)
    assert load(tmp_path / "sae").about == {"second": True}
    assert [f.name for f in tmp_path.iterdir()] == ["sae"]


def test_a_link_to_an_sae_stays_a_link(tmp_path):
    made("gated").save(tmp_path / "sae")
    (tmp_path / "link").symlink_to(tmp_path / "sae")
    for _ in range(2):
        made("topk").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    same_sae(load(tmp_path / "sae"), made("topk"))


@pytest.mark.parametrize("foreign", ["notes.txt", "beside", "file"])
def test_nothing_else_is_ever_replaced(foreign, tmp_path):
    folder = tmp_path / "sae"
    if foreign == "file":
        folder.write_text("mine")
    else:
        if foreign == "beside":  # an SAE, and something of the user's with it
            made().save(folder)
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than an SAE"):
        made("topk").save(folder)
    kept = folder if foreign == "file" else folder / "notes.txt"
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("at", [1, 2, "after"])
def test_a_kill_while_replacing_leaves_one_of_them(at, tmp_path, monkeypatch):
    old, new, folder = made("gated"), made("topk"), tmp_path / "sae"
    old.save(folder)
    done = []

    class Killed(BaseException):
        pass

    def rename(self, target):
        done.append(target)
        if len(done) == at:
            raise Killed
        return original(self, target)

    def rmtree(path, **options):
        if len(done) == 2:
            raise Killed
        return remove(path, **options)

    original, remove = Path.rename, shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            new.save(folder)
    if at == 1:
        same_sae(load(folder), old)
    elif at == 2:
        same_sae(load(tmp_path / "sae.replaced"), old)
        with pytest.raises(ValueError, match="There is no folder or file"):
            load(folder)
    else:
        same_sae(load(folder), new)
    for one in (new, old):  # what the kill left is in nobody's way
        one.save(folder)
        same_sae(load(folder), one)
    assert [f.name for f in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize(
    "about", [{"a": math.nan}, {"a": {1, 2}}, {"a": jnp.ones(2)}, {"a": -math.inf}]
)
def test_about_holds_plain_values(about, tmp_path):
    one = dataclasses.replace(made(), about=about)
    with pytest.raises(ValueError, match="about cannot be saved"):
        one.save(tmp_path / "sae")
    assert not list(tmp_path.iterdir())


# What load refuses --------------------------------------------------------------------


def edited(folder, change):
    """Changes the description; `change` gets its text or what it holds."""
    path = folder / DESCRIPTION
    found = json.loads(path.read_text())
    new = change(found)
    path.write_text(new if isinstance(new, str) else json.dumps(new))


def of_sae(**fields):
    return lambda found: {**found, "sae": {**found["sae"], **fields}}


def without(*path):
    def change(found):
        inner = found
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return found

    return change


DESCRIPTIONS = {
    "other format": (lambda f: {**f, "format": "x.9"}, r"format is 'x\.9', not"),
    "no format": (without("format"), "has no 'format'"),
    "no sae": (without("sae"), "has no 'sae'"),
    "no about": (without("about"), "has no 'about'"),
    "no checksum": (without("sha256"), "has no 'sha256'"),
    "no rule": (without("sae", "rule"), "missing 1 required positional.*'rule'"),
    "empty": (lambda f: "", "Expecting value"),
    "damaged": (lambda f: json.dumps(f)[:-9], "cannot be used"),
    "list": (lambda f: [f], "cannot be used: list indices"),
    "number": (lambda f: 5, "cannot be used"),
    "sae a list": (lambda f: {**f, "sae": ["relu"]}, "cannot be used"),
    "about a list": (lambda f: {**f, "about": [["a", 1]]}, "about is not an object"),
    "nested": (lambda f: '{"format": ' + "[" * 10**5, "recursion"),
    "nan": (lambda f: '{"format": NaN}', "NaN is no number of JSON"),
    "infinity": (of_sae(n_features=math.inf), "Infinity is no number of JSON"),
    "foreign field": (of_sae(execute="x"), "unexpected keyword argument 'execute'"),
    "fraction": (of_sae(n_features=64.5), r"n_features=64\.5 must be an integer"),
    "bool": (of_sae(n_features=True), "n_features=True must be an integer"),
    "negative": (of_sae(d_in=-16), "d_in=-16 must be finite and not negative"),
    "text": (of_sae(dtype="float8"), "dtype='float8' must be one of"),
    "unknown rule": (of_sae(rule="tpk(k=4)"), "(?s)Did you mean 'topk'.*load_file"),
    "no spec": (of_sae(rule=None), "rule=None must be a spec string"),
    "deep spec": (of_sae(rule="topk(k=" + "-" * 10**5 + "1)"), "cannot be used"),
    "code": (of_sae(rule="topk(k=__import__('os').system('x'))"), "not a literal"),
    "a call": (of_sae(rule="__import__('os').system('x')"), "Cannot read"),
    "a lambda": (of_sae(rule="topk(k=(lambda: 4)())"), "not a literal"),
}


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("name", list(DESCRIPTIONS))
def test_a_description_that_cannot_be_used_is_refused(name, tmp_path):
    change, message = DESCRIPTIONS[name]
    folder = made().save(tmp_path / "sae")
    edited(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(folder / DESCRIPTION) in str(caught.value)


@pytest.mark.parametrize("size", [10**12, 2**63, 10**40, 10**400])
def test_an_absurd_size_costs_neither_memory_nor_time(size, tmp_path):
    """The decoder alone would take 64 TB."""
    folder = made().save(tmp_path / "sae")
    edited(folder, of_sae(n_features=size))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"W_dec is float32\[64, 16\], need|cannot be"):
        load(folder)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("missing", [ARRAYS, DESCRIPTION])
def test_a_missing_file_is_named(missing, tmp_path):
    folder = made().save(tmp_path / "sae")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"has no {re.escape(missing)}"):
        load(folder)
    with pytest.raises(ValueError, match="There is no folder or file"):
        load(tmp_path / "nowhere")


def rewritten(folder, change):
    """Other arrays, with a checksum that fits them."""
    arrays = load_file(folder / ARRAYS)
    change(arrays)
    save_file(arrays, folder / ARRAYS)
    sealed(folder)


def sealed(folder):
    checksum = hashlib.sha256((folder / ARRAYS).read_bytes()).hexdigest()
    edited(folder, lambda found: {**found, "sha256": checksum})


def test_faults_of_arrays_are_told_together(tmp_path):
    folder = made("gated").save(tmp_path / "sae")

    def change(arrays):
        del arrays["params.b_dec"]
        arrays["params.b_enc"] = arrays["params.b_enc"].astype(np.float16)
        arrays["params.W_dec"] = arrays["params.W_dec"].T.copy()
        arrays["../../etc/passwd"] = np.zeros(1, np.float32)

    rewritten(folder, change)
    with pytest.raises(ValueError, match="is missing") as caught:
        load(folder)
    source = folder / ARRAYS
    assert str(caught.value).splitlines() == [
        f"{source}: params.b_dec is missing.",
        f"{source}: '../../etc/passwd' is foreign.",
        f"{source}: params.W_dec is float32[16, 64], needed is float32[64, 16].",
        f"{source}: params.b_enc is float16[64], needed is float32[64].",
    ]
    assert [f.name for f in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("name", ["state.spy", "params", "", "constants.a.b", "x\ny"])
def test_a_foreign_array_is_refused(name, tmp_path):
    folder = made().save(tmp_path / "sae")
    rewritten(folder, lambda arrays: arrays.update({name: np.zeros(1, np.float32)}))
    with pytest.raises(ValueError, match="is foreign"):
        load(folder)


def test_arrays_of_another_sae_are_refused(tmp_path):
    """Of the same rule and sizes: only the checksum tells."""
    one, other = (
        made().save(tmp_path / "a"),
        transcoder("relu", 16).save(tmp_path / "b"),
    )
    shutil.copy(other / ARRAYS, one / ARRAYS)
    with pytest.raises(ValueError, match="belongs to another"):
        load(one)


@pytest.mark.parametrize("cut", [0, 3, 8, 50, 4000])
def test_truncated_arrays_are_refused(cut, tmp_path):
    folder = made().save(tmp_path / "sae")
    data = (folder / ARRAYS).read_bytes()
    (folder / ARRAYS).write_bytes(data[:cut])
    with pytest.raises(ValueError, match="is damaged"):
        load(folder)
    sealed(folder)  # even where the checksum is right
    with pytest.raises(ValueError, match="cannot be read"):
        load(folder)


def mutated(data, rng):
    """A few bits flipped, the end cut off, or a piece moved."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(3)
    if kind == 0:
        new = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            # Half of them in the beginning, where the header is.
            place = rng.randrange(len(data) if rng.random() < 0.5 else 400)
            new[place] ^= 1 << rng.randrange(8)
        return bytes(new)
    if kind == 1:
        return data[:at]
    to = rng.randrange(len(data) + 1)
    return data[:to] + data[at : min(end, at + 300)] + data[to:]


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("seal", [False, True])
def test_damage_is_refused_or_does_no_harm(seal, tmp_path):
    """300 damaged copies each; with `seal` the checksum is that of the damaged file."""
    rng, one = random.Random(int(seal)), made("group_bias")
    folder = one.save(tmp_path / "sae")
    files = {name: (folder / name).read_bytes() for name in (ARRAYS, DESCRIPTION)}
    loaded, began = 0, time.monotonic()
    for _ in range(300):
        for name, data in files.items():
            (folder / name).write_bytes(data)
        name = ARRAYS if seal else rng.choice([ARRAYS, DESCRIPTION])
        (folder / name).write_bytes(mutated(files[name], rng))
        if seal:
            sealed(folder)
        try:
            again = load(folder)
        except ValueError:
            continue
        loaded += 1
        if not seal:
            assert again.sae.d_in == 16
            before, after = to_arrays(one.variables), to_arrays(again.variables)
            assert all((before[n] == after[n]).all() for n in before)
    assert 0 < loaded < 200  # neither does damage go unseen, nor is all refused
    assert time.monotonic() - began < 60


# Calling ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("rule", ["topk", "relu"])  # sparse and dense codes
def test_any_leading_axes(rule, shape):
    one = made(rule)
    flat = rows(4, math.prod(shape))
    x = flat.reshape(*shape, 16)
    want = applied(one.sae, one.variables, flat)
    x_hat, active = one(x)
    assert x_hat.shape == (*shape, 16)
    assert active.shape == (*shape, 64)
    same(x_hat.reshape(-1, 16), want.x_hat)
    same(active.reshape(-1, 64), to_dense(want.codes))
    same(one.encode(x), active)
    # Relative to x: decoded outside of the compiled program.
    np.testing.assert_allclose(one.decode(active), x_hat, rtol=1e-5, atol=1e-5)


def test_decode_puts_back_what_standardising_took():
    one = made("topk", treatment="standardise")
    x = rows(5, 6).reshape(2, 3, 16)
    x_hat, active = one(x)
    np.testing.assert_allclose(one.decode(active, like=x), x_hat, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs decode"):
        one.decode(active)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("inside", ["float32", "bfloat16"])
def test_types_of_what_comes_back(dtype, inside):
    one = made(dtype=inside)
    for x in (rows().astype(dtype), np.asarray(rows().astype(dtype))):
        x_hat, active = one(x)
        assert isinstance(x_hat, jax.Array)
        assert x_hat.dtype == dtype
        assert active.dtype == one.encode(x).dtype == inside
        assert one.decode(active).dtype == jnp.float32


def test_float64_of_numpy():
    one, x = made(), np.asarray(rows(), np.float64)
    same(one(x), one(rows()))
    assert one(x)[0].dtype == jnp.float32


def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    one, x = made("topk"), np.array(rows(4, 6)).reshape(2, 3, 16)
    tensor = torch.from_numpy(x.copy())
    want = one(x)
    same(one(tensor), want)
    same(one(tensor.clone().requires_grad_()), want)
    same(one(tensor.transpose(0, 1)), tuple(a.swapaxes(0, 1) for a in want))
    same(one(tensor[1:, 1:]), tuple(a[1:, 1:] for a in want))
    same(one.decode(torch.from_numpy(np.array(want[1]))), one.decode(want[1]))
    half = one(tensor.to(torch.bfloat16))
    assert half[0].dtype == jnp.bfloat16
    same(half, one(jnp.asarray(x, jnp.bfloat16)))


def test_each_shape_is_compiled_once(monkeypatch):
    one, traced = made(), []
    for name in ("apply", "encode"):
        original = getattr(SAE, name)

        def counted(self, variables, x, original=original, name=name, **more):
            traced.append((name, x.shape))
            return original(self, variables, x, **more)

        monkeypatch.setattr(SAE, name, counted)
    for n in (6, 6, 8, 6, 8):
        one(rows(1, n))
        one.encode(rows(2, n))
    one(rows(1, 6).reshape(2, 3, 16))  # as rows it is a shape that was there
    assert sorted(traced) == [
        (name, (n, 16)) for name in ("apply", "encode") for n in (6, 8)
    ]


@pytest.mark.usefixtures("as_users")
def test_input_that_cannot_be_used_is_named():
    one = made()
    faults = {
        "give at least one": np.zeros((0, 16), np.float32),
        "no rows": np.zeros((2, 0, 16), np.float32),
        r"x is of shape \(3, 0\); give an array of shape \[\.\.\., width\]": np.zeros(
            (3, 0), np.float32
        ),
        r"x is of shape \(\)": np.float32(3),
        "x is a list": [[1.0] * 16],
        r"needed is \[rows, 16\]": np.zeros((3, 15), np.float32),
        "holds int32": np.zeros((3, 16), np.int32),
    }
    for message, x in faults.items():
        for call in (one, one.encode):
            with pytest.raises(ValueError, match=message):
                call(x)
    with pytest.raises(ValueError, match=r"active has shape \(3, 16\); needed is"):
        one.decode(np.zeros((3, 16), np.float32))
    with pytest.raises(ValueError, match="like has 2 rows"):
        one.decode(np.zeros((3, 64), np.float32), like=np.zeros((2, 16), np.float32))


def test_what_the_package_offers():
    assert set(sae_jax.__all__) <= set(dir(sae_jax))
    for name in sae_jax.__all__:
        assert getattr(sae_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sae_jax.trian  # noqa: B018
