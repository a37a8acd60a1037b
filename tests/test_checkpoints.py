"""Checkpoints: what is restored is what was saved, whatever happened in between."""

import gc
import os
import random
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae_jax.run.checkpoints import Checkpoints, checksums

# Where Orbax cannot read one array, it drops its readings of the others half done,
# which Python remarks on when it clears them away, be it in the test after.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


class Named(NamedTuple):
    """A named tuple, as optimisers and members have them."""

    mu: Any
    rest: Any


def made(seed: int = 0) -> dict[str, Any]:
    """A state with everything that a state of training may hold."""
    w = jax.random.normal(jax.random.key(seed), (6, 5))
    return {
        "held": {
            "one": Named(w, {"empty": {}, "none": ()}),
            "two": Named(w.astype(jnp.bfloat16), optax.adam(0.1).init({"w": w})),
        },
        "key": jax.random.key(seed + 7),
        "keys": jax.random.split(jax.random.key(seed), 3),
        "bits": w > 0,
        "bytes": (100 * w).astype(jnp.int8),
        "nan": jnp.array([jnp.nan, jnp.inf, -0.0]),
        "step": jnp.int32(seed),
    }


def plain(tree: Any) -> list[tuple[str, bytes]]:
    """All arrays with types and bits."""
    leaves = [
        jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in leaves]


LIKE = jax.eval_shape(made)


def written(folder: Any, *steps: int) -> None:
    """Checkpoints of these steps, each of the state that has the step as its seed."""
    checkpoints = Checkpoints(folder, keep=len(steps))
    for step in steps:
        checkpoints.save(step, made(step), {"position": {"row": [step, None]}})
    checkpoints.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 5."""
    folder = tmp_path_factory.mktemp("two")
    written(folder, 3, 5)
    return folder


def restored(folder: Any, like: Any = LIKE) -> tuple[Any, list[str]]:
    """What a new process finds, and what it says of it."""
    said: list[str] = []
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(like, said.append), said
    finally:
        checkpoints.close()
        gc.collect()  # see `pytestmark`


def test_all_kinds_of_arrays_come_back_to_the_bit(two):
    found, said = restored(two)
    assert found.step == 5
    assert not said
    assert found.notes == {"position": {"row": [5, None]}}
    assert jax.tree.structure(found.state) == jax.tree.structure(made(5))
    assert plain(found.state) == plain(made(5))
    assert found.state["key"].dtype == jax.random.key(0).dtype
    assert jax.random.uniform(found.state["key"]) == jax.random.uniform(made(5)["key"])


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restored(tmp_path / "new") == (None, [])


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 4, 6, 9):
        checkpoints.save(step, made(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [6, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["6", "9"]
    checkpoints.close()
    with pytest.raises(ValueError, match="keep=0 checkpoints leaves none"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_is_not_written_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, made(2), {"n": 1})
    checkpoints.save(2, made(3), {"n": 2})
    found = checkpoints.restore(LIKE)
    assert found is not None
    assert found.notes == {"n": 1}
    assert plain(found.state) == plain(made(2))
    checkpoints.close()


def test_donation_right_after_save_changes_nothing(tmp_path):
    """The step overwrites its state's buffers while they are being written."""

    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    overwrite = jax.jit(overwrite, donate_argnums=0)
    like = {str(i): jnp.zeros((512, 257)) for i in range(4)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 16):
        state = {n: jnp.full_like(x, step) + int(n) for n, x in like.items()}
        expected = plain(state)
        checkpoints.save(step, state, {})
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        found = checkpoints.restore(like)
        assert found is not None
        assert found.step == step
        assert plain(found.state) == expected
        assert float(state["0"][0, 0]) == -1
    checkpoints.close()


def files(folder: Any) -> list[str]:
    """All files of the newest checkpoint that hold something."""
    return sorted(
        str(p.relative_to(folder))
        for p in (folder / "5").rglob("*")
        if p.is_file() and p.stat().st_size
    )


def flip(path: Any, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def truncate(path: Any, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path: Any, rng: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "times"),
    [(flip, 3), (truncate, 1), (delete, 1)],
    ids=["flip", "truncate", "delete"],
)
def test_damage_is_found_or_does_no_harm(two, tmp_path, damage, times):
    rng, found_out = random.Random(5), 0
    for i, name in enumerate(files(two) * times):
        folder = tmp_path / str(i)
        shutil.copytree(two, folder)
        damage(folder / name, rng)
        found, said = restored(folder)
        assert found is not None, name
        if found.step == 5:  # Orbax keeps some things twice
            assert not said, name
            assert plain(found.state) == plain(made(5)), name
            assert found.notes == {"position": {"row": [5, None]}}
            continue
        found_out += 1
        assert plain(found.state) == plain(made(3)), name
        assert found.notes == {"position": {"row": [3, None]}}
    assert found_out >= 3 * times


def test_damage_is_told_and_what_is_newer_makes_room(two, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(two, folder)
    largest = max(files(two), key=lambda name: (two / name).stat().st_size)
    for path in (folder / "5").rglob("*"):
        if path.is_file() and path.name == (two / largest).name:
            flip(path, random.Random(1))
    shutil.rmtree(folder / "5" / "state" / "d")
    found, said = restored(folder)
    assert found.step == 3
    assert len(said) == 1
    assert said[0].startswith(f"The checkpoint {folder / '5'} cannot be used: ")
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [3]
    checkpoints.save(5, made(5), {})
    found = checkpoints.restore(LIKE)
    assert found is not None
    assert plain(found.state) == plain(made(5))
    checkpoints.close()
    for step in ("3", "5"):
        shutil.rmtree(folder / step / "state" / "d")
    with pytest.raises(ValueError, match=r"None of the checkpoints in .* can be used"):
        restored(folder)


def test_one_changed_bit_of_any_array_changes_its_checksum():
    before, rng = checksums(made()), random.Random(3)
    leaves, structure = jax.tree.flatten(made())
    for place in range(len(leaves)):
        changed = list(leaves)
        leaf = leaves[place]
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.array(jax.random.key_data(leaf) if typed else leaf)
        words = array.reshape(-1).view(np.uint8)
        bits = 1 if array.dtype == bool else 8
        words[rng.randrange(len(words))] ^= 1 << rng.randrange(bits)
        changed[place] = jnp.asarray(array)
        if typed:
            changed[place] = jax.random.wrap_key_data(changed[place])
        after = checksums(jax.tree.unflatten(structure, changed))
        assert [n for n in before if before[n] != after[n]] == [list(before)[place]]


def test_swapped_words_change_the_checksum():
    x = jnp.arange(12.0).reshape(3, 4)
    for other in (x[::-1], x[:, ::-1], x.at[0, :2].set(jnp.array([1.0, 0.0]))):
        assert checksums(x) != checksums(other)


def test_a_state_of_another_shape_is_refused(two, tmp_path):
    shutil.copytree(two, tmp_path / "copy")
    wider = {**LIKE, "nan": jax.ShapeDtypeStruct((4,), jnp.float32)}
    more = {**LIKE, "more": LIKE["nan"]}
    fewer = {name: LIKE[name] for name in LIKE if name != "nan"}
    other = {**LIKE, "step": jax.ShapeDtypeStruct((), jnp.float32)}
    for like in (wider, more, fewer, other):
        with pytest.raises(ValueError, match="None of the checkpoints"):
            restored(tmp_path / "copy", like)
    assert restored(tmp_path / "copy")[0].step == 5, "nothing was removed"


def test_what_a_killed_save_leaves_is_ignored(two, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(two, folder)
    shutil.copytree(two / "5", folder / "8.orbax-checkpoint-tmp-12")
    (folder / "9").mkdir()  # begun, and nothing written
    found, _ = restored(folder)
    assert found.step == 5
    checkpoints = Checkpoints(folder)
    for step in (8, 9):
        checkpoints.save(step, made(step), {})
    found = checkpoints.restore(LIKE)
    assert found is not None
    assert plain(found.state) == plain(made(9))
    assert checkpoints.steps() == [8, 9]
    checkpoints.close()


DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sae_jax.run.checkpoints import Checkpoints, checksums
folder, do, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert len(jax.devices()) == n
mesh = jax.make_mesh((n,), ("rows",), axis_types=(AxisType.Auto,))
split, whole = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
w, key = jnp.arange(64.0).reshape(16, 4) / 3, jax.random.key(5)
state = {"w": jax.device_put(w, split), "key": jax.device_put(key, whole)}
checkpoints = Checkpoints(folder)
if do == "save":
    checkpoints.save(1, state, {})
else:
    like = state if do == "placed" else jax.eval_shape(lambda: {"w": w, "key": key})
    state = checkpoints.restore(like).state
    assert len(state["w"].sharding.device_set) == (n if do == "placed" else 1)
checkpoints.close()
print(checksums(state), np.asarray(state["w"]).tobytes().hex())
"""


@pytest.mark.parametrize(("n", "m"), [(8, 1), (1, 8)])
def test_the_number_of_devices_may_change(tmp_path, n, m):
    def run(do, devices):
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c", DEVICES, str(tmp_path), do, str(devices)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    saved = run("save", n)
    assert run("plain", m) == saved
    assert run("placed", m) == saved
