"""One step on eight devices is the step on one, and devices never exchange codes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sae_jax
from sae_jax import RULES, SAE, AuxK, adam, init_state, largest, make_step, mesh, select
from sae_jax.binding import bind
from sae_jax.codes import to_dense
from sae_jax.training.ensemble import Ensemble
from sae_jax.training.window import empty
from tests import contract
from tests.contract import KEY, close
from tests.test_ensemble import Steady

# With the usual 1e-8, gradients that cancel to rounding errors move parameters.
OPTIMISER = adam(1e-2, eps=1e-3)
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8)}
B, D, F = 512, 8, 2048  # so that gradients and candidates are fewer than codes
AUX = AuxK(dead_after=2, k=16)
meshes = pytest.mark.parametrize("sizes", list(MESHES.values()), ids=list(MESHES))

# Rules of a user's own are tested on one of the meshes, and on all by `make test-slow`.
ON_MESHES = [
    pytest.param(
        name,
        sizes,
        id=f"{name}-{text}",
        marks=[pytest.mark.slow] * (name.startswith("toy_") and text != "4x2"),
    )
    for name in RULES
    for text, sizes in MESHES.items()
]


def entered(sizes):
    return jax.set_mesh(mesh.make(dict(zip(("data", "feature"), sizes, strict=True))))


def bound(name):
    return bind(RULES[name], RULES[name].example)


def batch(i, masked=False):
    # Row 135 of the third batch has to be among the masked ones: for Top-AFA its 16th
    # and 17th strongest dead features, of which AuxK takes 16, are a rounding error
    # apart.
    x = contract.rows(20 + i, B, D)
    found = {"x": x, "grad": contract.gradient_of_model(x)}
    return {**found, "mask": jnp.arange(B) % 5 != 0} if masked else found


def placed(rows):
    return jax.device_put(rows, mesh.ROWS) if mesh.spread() else rows


def stepped(rule, steps=4, masked=False, **options):
    """The state after some steps, their last metrics, the compiled program."""
    sae = SAE(D, F, rule=rule)
    state = init_state(sae, OPTIMISER, KEY)
    lowered = make_step(sae, OPTIMISER, aux=AUX, **options).lower
    program = lowered(state, placed(batch(0, masked))).compile()
    metrics = None
    for i in range(steps):
        state, metrics = program(state, placed(batch(i, masked)))
    return state, metrics, program.as_text()


@functools.cache
def on_one(name, masked, **options):
    return jax.device_get(stepped(bound(name), masked=masked, **options)[:2])


def same_step(found, expected):
    (state, metrics), (other, others) = jax.device_get(found), expected
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], 1e-4, 1e-5, err_msg=name)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), state.variables, other.variables)
    np.testing.assert_array_equal(state.steps_idle, other.steps_idle)


@pytest.mark.parametrize(("name", "sizes"), ON_MESHES)
def test_a_step_on_a_mesh_is_that_on_one_device(name, sizes):
    masked = sizes == (4, 2)
    with entered(sizes):
        state, metrics, text = stepped(bound(name), masked=masked)
    same_step((state, metrics), on_one(name, masked))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        where = jax.tree_util.keystr(path)
        by_feature = leaf.shape[:1] == (F,)
        spec = PartitionSpec("feature") if by_feature else PartitionSpec()
        wanted = NamedSharding(leaf.sharding.mesh, spec)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), where
        assert len(leaf.sharding.device_set) == 8, where
    W_enc = state.variables.params.get("W_enc")
    if W_enc is not None:
        parts = {shard.data.shape for shard in W_enc.addressable_shards}
        assert parts == {(F // sizes[1], D)}
    found = exchanged(text)
    assert found, "there is nothing to be exchanged?"
    assert max(size for _, size in found) < B * F / 8, found


@pytest.mark.parametrize("name", ["relu", "topk", "top_afa"])
def test_pieces_on_a_mesh(name):
    expected = on_one(name, False, accumulate=4)
    with entered((4, 2)):
        same_step(stepped(bound(name), accumulate=4)[:2], expected)


@meshes
@pytest.mark.parametrize("k", [8, F])
def test_dead_features_learn_alike(k, sizes):
    """More of them than the loss takes, and fewer."""
    sae = SAE(D, F, rule="topk(k=1)")
    along = contract.rows(5, B, D)[:1]  # all rows, so all fire one feature
    alike = {"x": jnp.linspace(1, 2, B)[:, None] * along}

    def one_step():
        step = make_step(sae, OPTIMISER, aux=AuxK(dead_after=1, k=k))
        return step(init_state(sae, OPTIMISER, KEY), alike)

    expected = jax.device_get(one_step())
    assert expected[1]["loss_aux"] > 0
    with entered(sizes):
        same_step(one_step(), expected)


# What devices tell each other


def exchanged(text):
    """Numbers in the results of each collective of a compiled program, by its name."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    text = re.sub(r"/\*.*?\*/", "", text)  # in long tuples: /*index=5*/
    for result, kind in re.findall(
        rf"= (\(?[^=]*?\)?) ({kinds}|ragged-all-to-all)(?:-start)?\(", text
    ):
        sizes = [
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"\w+\[([\d,]*)\]", result)
        ]
        found.append((kind, sum(sizes)))
    return found


def test_codes_that_are_exchanged_are_seen():
    def sorts(inputs, params, state, *, k: int = 4):
        least = jnp.sort(inputs.pre, axis=1)[:, -k][:, None]
        return sae_jax.Encoded(jnp.where(inputs.pre >= least, inputs.pre, 0), state, {})

    rule = sae_jax.Rule(
        name="sorts", paper="", decides="", encode=sorts, example={}, knob="k"
    )
    with entered((4, 2)):
        text = stepped(bind(rule, {}), steps=0)[2]
    assert max(size for _, size in exchanged(text)) >= B * F / 8


def test_tuples_of_results_are_counted():
    text = """
      %a = (f32[2,3]{1,0}, /*index=1*/s32[4]{0}) all-reduce(%x, %y), channel_id=1
      %b = f32[8,8]{1,0:T(8,128)} all-gather(%z), dimensions={1}
      %c = (f32[1]{0}, f32[5]{0}) all-gather-start(%w)
      %d = f32[] all-reduce(%v)
      %e = f32[100]{0} add(%v, %all-reduce)
    """
    assert exchanged(text) == [
        ("all-reduce", 10),
        ("all-gather", 64),
        ("all-gather", 6),
        ("all-reduce", 1),
    ]


# Selection


def scores(tied):
    rng = np.random.default_rng(3)
    drawn = rng.integers(0, 4, (48, 64)) if tied else rng.normal(size=(48, 64))
    return jnp.asarray(drawn, jnp.float32)


def cut(how):
    def selection(s, share):
        target = share * jnp.linalg.norm(jnp.maximum(s, 0), axis=1)
        return select.norm_cut(s, target, how=how)

    return selection


SELECTIONS = {
    "rows": (lambda s, n: select.rows(s, n, count_max=40), (1, 5, 40)),
    "columns": (lambda s, n: select.columns(s, n, count_max=s.size), (1, 5, 40)),
    "each its own": (
        lambda s, n: select.columns(s, n * jnp.arange(64) % 7, count_max=s.size),
        (1, 3),
    ),
    "batch": (
        lambda s, n: select.batch(s, n, count_max=s.size),
        (0, 1, 50, 700, 48 * 64),
    ),
    "nearest": (cut("nearest"), (0.0, 0.3, 0.9, 1.2)),
    "exceed": (cut("exceed"), (0.0, 0.3, 0.9, 1.2)),
}


@meshes
@pytest.mark.parametrize("kind", SELECTIONS)
def test_selections_are_those_of_one_device_ties_included(kind, sizes):
    selection, amounts = SELECTIONS[kind]
    for s in (scores(tied=False), scores(tied=True)):
        expected = [np.asarray(jax.jit(selection)(s, n)) for n in amounts]
        with entered(sizes):
            found = [np.asarray(jax.jit(selection)(s, n)) for n in amounts]
        np.testing.assert_array_equal(expected, found)


@meshes
def test_few_of_many_are_found_with_their_places(sizes):
    s = jnp.tile(scores(tied=True), (1, 8))  # 512 features, so that 5 are few
    expected = largest.per_row(s, 5)
    with entered(sizes):
        found = jax.jit(lambda s: largest.per_row(s, 5))(s)
        sparse = jax.jit(lambda s: tuple(select.rows(s, 3, count_max=5))[:2])(s)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(sparse[0], expected[1])


# SAEs side by side


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        ("topk", (4, 2, 1)),
        ("topk", (2, 1, 4)),
        *((rule, (2, 2, 2)) for rule in ("topk", "batch_topk", "top_afa", "gated")),
    ],
)
def test_members_are_spread_over_devices(rule, sizes):
    """Four, on a third axis: each is as on one device, and where it is to be."""
    n = 4
    recipe = Steady(steps=50, aux=AUX)
    saes = (SAE(D, F, rule=bound(rule)),) * n
    rates = (1e-2, 3e-3, 2e-2, 1e-3)

    def stepped_together(steps=4):
        at_once = sizes[0] if mesh.spread() else 1
        ensemble = Ensemble(saes, recipe, rates, at_once)
        starts = []
        for i in range(n):
            state = init_state(saes[i], recipe.optimiser(), jax.random.key(i))
            step = recipe.make_step(saes[i], jit=False)
            starts.append((state, empty(step, state, batch(0))))
        own, (state, window) = ensemble.own(), ensemble.stacked(starts)
        step = jax.jit(ensemble.make_step())
        program = step.lower(own, state, window, placed(batch(0))).compile()
        for i in range(steps):
            state, window = program(own, state, window, placed(batch(i)))
        each = [jax.device_get(ensemble.of(window.values, i)) for i in range(n)]
        params = [jax.device_get(ensemble.of(state.variables, i)) for i in range(n)]
        return each, params, state, program.as_text()

    values, variables, _, _ = stepped_together()
    with jax.set_mesh(mesh.make(dict(zip(mesh.AXES, sizes, strict=True)))):
        found, theirs, state, text = stepped_together()
    for i in range(n):
        for name, value in found[i].items():
            np.testing.assert_allclose(value, values[i][name], 1e-4, 1e-5, err_msg=name)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), theirs[i], variables[i])
    W_dec = state.variables.params["W_dec"]
    parts = {shard.data.shape for shard in W_dec.addressable_shards}
    assert parts == {(n // sizes[0], F // sizes[2], D)}
    most = max((size for _, size in exchanged(text)), default=0)
    assert most < B * F / (sizes[1] * sizes[2]), exchanged(text)


# Where parameters come from


def test_parameters_are_made_in_parts():
    sae = SAE(64, 4096, rule="jump_relu")
    whole = 64 * 4096 * 4
    with entered((1, 8)):
        state = init_state(sae, OPTIMISER, KEY)
        start = mesh.in_parts(lambda key: sae.init(key), 4096, KEY)
        memory = start.lower(KEY).compile().memory_analysis()
    W_dec = state.variables.params["W_dec"]
    assert {s.data.nbytes for s in W_dec.addressable_shards} == {whole // 8}
    used = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert used < whole / 2, "both matrices of a device, and what makes them"
    alone = init_state(sae, OPTIMISER, KEY)
    close(W_dec, alone.variables.params["W_dec"])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 4}, r"a mesh of data:4 needs 4 devices; there are 8"),
        ({"data": 0}, r"data:0 needs 0 devices"),
        ({"model": 8}, r"mesh axis 'model' is unknown; there are 'data'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        mesh.make(sizes)


def test_codes_on_a_mesh_evaluate_as_on_one_device():
    sae, variables = contract.build(bound("topk"))
    x = contract.rows(3, 16)
    expected = sae.apply(variables, x)
    with entered((4, 2)):
        out = jax.jit(sae.apply)(variables, x)
        dense = jax.jit(to_dense)(out.codes)
    close(out.x_hat, expected.x_hat)
    close(dense, to_dense(expected.codes))
