"""What the formulas of `sizing` say of a step is what XLA says of its program.

Steps are compiled for eight simulated devices, and never run. With the extra `tpu` the
TPU's own compiler is asked as well (`make test-slow`); it needs no TPU.
"""

import functools
import importlib.util
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from experiments import _roofline
from experiments._sizing import Split, Step, shapes
from sae_jax import SAE, AuxK, Recipe, mesh, piecewise

SPLITS = [Split(8, 1), Split(4, 2), Split(1, 8)]
B, D, F = 512, 64, 4096
RECIPES = {
    "plain": Recipe(use_aux="never"),
    "aux": Recipe(use_aux="always", aux=AuxK(k=32)),  # k < F / 32, as at full size
}
KINDS_OF_CODES = ("sparse", "dense")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
SCALARS = 64  # bytes of them that a step sums over an axis, at most


def step(kind, split, recipe="plain", size=(B, D, F), dtype="float32", k=8):
    n_rows, width, n_features = size
    rule = {"sparse": f"topk(k={k})", "dense": "relu"}[kind]
    sae = SAE(width, n_features, rule, dtype=dtype)
    return Step(sae, n_rows, RECIPES[recipe], split)


def compiled(found, devices):
    """Its program on a mesh of these devices."""
    alone = shapes(found.sae, found.recipe)
    places = Mesh(
        devices.reshape(found.split),
        ("data", "feature"),
        axis_types=(AxisType.Auto,) * 2,
    )
    with jax.set_mesh(places), pytest.MonkeyPatch.context() as patch:
        # As on an accelerator: on a CPU selection takes 256 rows at a time.
        patch.setattr(piecewise.jax, "default_backend", lambda: "tpu")
        state = mesh.like(alone, found.sae.n_features)
        size = found.batch, found.sae.d_in
        where = NamedSharding(places, mesh.ROWS)
        rows = jax.ShapeDtypeStruct(size, jnp.float32, sharding=where)
        return found.recipe.make_step(found.sae).lower(state, {"x": rows}).compile()


@functools.cache
def simulated(kind, split, recipe="plain"):
    """The step, and its program on simulated devices."""
    found = step(kind, split, recipe)
    devices = mesh.make(split._asdict()).devices
    return found, compiled(found, devices)


PLAIN = [(kind, split, "plain") for kind in KINDS_OF_CODES for split in SPLITS]
WITH_AUX = [("sparse", split, "aux") for split in SPLITS[1:]]


def each(*cases):
    return pytest.mark.parametrize(("kind", "split", "recipe"), cases, ids=str)


# Communication


def collectives(text):
    """Bytes of all results of the collectives of a program, by kind and group size."""
    found = Counter()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        match = re.search(rf"= (\(?[^=]*?\)?) ({KINDS})(?:-start)?\(", line)
        if not match:
            continue
        n = group(line)
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            size = math.prod(map(int, filter(None, shape.split(","))))
            found[match[2], n] += BYTES[kind] * size if n > 1 else 0
    return +found


def group(line):
    """How many devices tell each other something."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", line)
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in named[2].split(","))


def expected(found):
    """The same by the formulas."""
    sums = Counter()
    for e in found.exchanges():
        sums[e.kind, e.n] += e.result
    return sums


@each(*PLAIN)
def test_what_devices_send_is_what_the_program_sends(kind, split, recipe):
    found, program = simulated(kind, split, recipe)
    ours, theirs = expected(found), collectives(program.as_text())
    assert ours.keys() == theirs.keys()
    for key, size in theirs.items():
        assert 0 <= size - ours[key] <= SCALARS, (key, size, ours[key])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "%a = (f32[2,3]{1,0}, s32[4]{0}, /*index=5*/f32[]) all-reduce(%x), "
            "replica_groups={{0,1},{2,3}}, to_apply=%add",
            {("all-reduce", 2): 44},
        ),
        (
            "%b = bf16[8,8]{1,0:T(8,128)} all-gather(%z), replica_groups=[2,4]<=[8]",
            {("all-gather", 4): 128},
        ),
        (
            "%c = pred[5] all-reduce(%z), "
            "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) "
            "{'axis_0'}, use_global_device_ids=true",
            {("all-reduce", 4): 5},
        ),
        ("%d = f32[5] all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add", {}),
        ("%e = f32[5] add(%z, %all-reduce)", {}),
    ],
)
def test_collectives_are_read(line, found):
    assert collectives(line) == found


# Memory


@each(*PLAIN, *WITH_AUX)
def test_state_and_rows_are_exact(kind, split, recipe):
    found, program = simulated(kind, split, recipe)
    memory = program.memory_analysis()
    state = sum(found.state().values())
    assert memory.alias_size_in_bytes == state
    assert memory.argument_size_in_bytes == state + found.rows()


@each(*PLAIN, *WITH_AUX)
def test_temporaries_are_near(kind, split, recipe):
    """From a seventh less to a tenth more."""
    found, program = simulated(kind, split, recipe)
    ours = _roofline.passing(found)
    theirs = program.memory_analysis().temp_size_in_bytes
    assert 0.86 < theirs / ours < 1.1, (theirs, ours)


# Operations


@pytest.mark.parametrize("kind", KINDS_OF_CODES)
def test_operations_are_those_of_the_program(kind):
    """XLA counts what is not a product as well, such as Adam: up to a tenth here.

    Rows are so wide that selecting, which does not grow with them, is part of that.
    """
    found = step(kind, Split(1, 8), size=(B, 512, F))
    program = compiled(found, mesh.make(found.split._asdict()).devices)
    ours, theirs = _roofline.operations(found), program.cost_analysis()["flops"]
    assert 1 <= theirs / ours < 1.1, (theirs, ours)


# The TPU's own compiler


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)
@pytest.mark.parametrize(
    ("kind", "split", "recipe", "temporaries", "bytes_moved"),
    [
        ("sparse", Split(4, 2), "plain", 0.85, 1.0),
        ("dense", Split(4, 2), "plain", 0.75, 1.0),
        ("dense", Split(8, 1), "plain", 0.75, 1.06),
    ],
    ids=str,
)
def test_the_compiler_of_tpus_agrees(kind, split, recipe, temporaries, bytes_moved):
    """At a size of the table, in bfloat16; it tiles arrays, and packs booleans.

    Ratios of its temporaries and of the bytes it counts, to ours, as they were found.
    """
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    size = 4096, 768, 131_072
    found = step(kind, split, recipe, size, "bfloat16", k=64)
    program = compiled(found, np.array(topology.devices))
    memory = program.memory_analysis()
    held = sum(found.state().values()) + found.rows()
    assert memory.argument_size_in_bytes == pytest.approx(held, rel=0.001)
    assert memory.temp_size_in_bytes / _roofline.passing(found) == pytest.approx(
        temporaries, rel=0.05
    )
    moved = program.cost_analysis()["bytes accessed"] / _roofline.moved(found)
    assert moved == pytest.approx(bytes_moved, rel=0.05)
    ours, theirs = expected(found), collectives(program.as_text())
    for key in ours.keys() | theirs.keys():
        # Of ReLU it sums the gradient of one matrix in bfloat16.
        least = 0.74 if kind == "dense" and key[1] == split.data else 0.998
        near = least * ours[key] <= theirs[key] <= 1.001 * ours[key] + SCALARS
        assert near, (key, ours[key], theirs[key])
