"""A run over a mesh or by pmap is the run on one device, and resumes on others."""

import dataclasses

import jax
import numpy as np
import pytest

from sae_jax import SAE, mesh
from sae_jax.activations.in_memory import InMemory
from sae_jax.losses import AuxK
from sae_jax.run.checkpoints import Checkpoints
from sae_jax.run.devices import OneDevice, OnMesh, Pmap
from sae_jax.run.loop import Every, Loop
from sae_jax.run.members import Member
from sae_jax.training.recipe import Recipe
from tests.conftest import planted

X = planted(16, 48, 0.1, 640)[0]
RECIPE = Recipe(steps=12, lr=1e-2, aux=AuxK(dead_after=3, k=16))
MEMBERS = {
    "topk": Member(SAE(16, 64, "topk(k=4)", treatment="scale"), "x"),
    "again": Member(SAE(16, 64, "topk(k=3)", treatment="scale"), "x", seed=2, lr=3e-3),
    "afa": Member(SAE(16, 64, "top_afa(coef=0.1)", b_dec_start="mean"), "x", seed=1),
}
BATCHED = {"batch_topk": Member(SAE(16, 64, "batch_topk(k=4)"), "x")}


def on_mesh(**sizes):
    return OnMesh(mesh.make(sizes))


def run(devices=None, members=MEMBERS, recipe=RECIPE, **options):
    stream = InMemory({"x": X}, batch=32, seed=2)
    more = {"devices": devices} if devices else {}
    loop = Loop(members, stream, recipe, progress=False, **more, **options)
    return loop.run(), loop.history


def check_same(found, expected):
    (trained, history), (others, lines) = found, expected
    for name, one in trained.items():
        a, b = jax.device_get((one.variables, others[name].variables))
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, 1e-3, 1e-4), a, b)
        assert len(one.variables.params["W_dec"].sharding.device_set) == 1
        assert len(history[name]) == len(lines[name]) > 0
        for line, other in zip(history[name], lines[name], strict=True):
            assert line.keys() == other.keys()
            for key in set(line) - {"sae", "kind"}:
                assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(
    "make",
    [
        lambda: on_mesh(data=4, feature=2),
        Pmap,
    ],
    ids=["data:4,feature:2", "pmap"],
)
def test_a_run_is_that_of_one_device(make):
    every = Every(log=5)
    check_same(run(make(), every=every), run(every=every))


@pytest.mark.parametrize(
    "make", [lambda: on_mesh(data=4, feature=2), Pmap], ids=["mesh", "pmap"]
)
def test_batches_are_taken_in_pieces_on_devices_too(make):
    recipe = Recipe(steps=6, lr=1e-2, accumulate=2)
    check_same(run(make(), recipe=recipe), run(recipe=recipe))


def test_a_sweep_goes_on_with_fewer_devices(tmp_path):
    """Spread over three axes at first; the second half is done on one device."""
    members = {
        f"{k} {lr}": Member(SAE(16, 64, f"topk(k={k})"), "x", seed=k, lr=lr)
        for k in (3, 4)
        for lr in (None, 3e-3)
    }
    every, half = Every(log=6, save=6), dataclasses.replace(RECIPE, steps=6)
    devices = on_mesh(member=2, data=2, feature=2)
    for where, recipe in ((devices, half), (None, RECIPE)):
        store = Checkpoints(tmp_path)
        found = run(where, members, recipe, every=every, checkpoints=store)
        store.close()
    check_same(found, run(members=members, every=every))


def test_a_run_goes_on_with_another_mesh(tmp_path):
    """Six steps on one mesh, four on another, the rest on one device."""

    class Stopped(Exception):
        pass

    def stops_after(steps):
        def evaluate(*_):
            if len(seen) == steps:
                raise Stopped
            seen.append(1)
            return {}

        seen = []
        return evaluate

    every = Every(log=1, evaluate=1, save=1)
    members = {**MEMBERS, **BATCHED}
    for devices, steps in (
        (on_mesh(data=8), 6 * 4),
        (on_mesh(data=2, feature=4), 4 * 4),
    ):
        store = Checkpoints(tmp_path)
        options = {"every": every, "evaluate": stops_after(steps)}
        with pytest.raises(Stopped):
            run(devices, members, checkpoints=store, **options)
        store.close()
    store = Checkpoints(tmp_path)
    found, _ = run(OneDevice(), members, checkpoints=store, every=every)
    store.close()
    expected, _ = run(members=members)
    for name, one in found.items():
        a, b = jax.device_get((one.variables, expected[name].variables))
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, 1e-3, 1e-4), a, b)


@pytest.mark.parametrize(
    ("make", "members", "said"),
    [
        (Pmap, BATCHED, "runner=pmap cannot train batch_topk, which looks over whole"),
        (
            lambda: on_mesh(feature=8),
            {"odd": Member(SAE(16, 65, "relu"), "x")},
            "65 features cannot be spread evenly over mesh feature:8",
        ),
        (
            lambda: on_mesh(member=8),
            BATCHED,
            "1 SAEs that are alike cannot be spread evenly over mesh member:8",
        ),
    ],
)
def test_what_devices_cannot_do_is_said_at_once(make, members, said):
    with pytest.raises(ValueError, match=said):
        run(make(), members)


def test_rows_that_cannot_be_spread_are_refused():
    recipe, stream = Recipe(steps=1, accumulate=4), InMemory({"x": X}, batch=16)
    said = "4 rows at once cannot be spread evenly over mesh data:8"
    with pytest.raises(ValueError, match=said):
        Loop(MEMBERS, stream, recipe, devices=on_mesh(data=8))


@pytest.mark.parametrize("text", ["data", "data:", "data:x", ":4x"])
def test_a_mesh_is_typed_as_axis_and_size(text):
    with pytest.raises(ValueError, match="is not axis:size, as in data:4,feature:2"):
        mesh.parse([text])
    assert mesh.parse(["data:4", "feature:2"]) == {"data": 4, "feature": 2}
