"""The products of sparse codes and their gradients, against sums taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAE, pair_sums, products, select
from sae_jax.codes import Pairs, Sparse

B, D, F = 6, 5, 40
DTYPES = ["float32", "bfloat16"]


def drawn(seed=0):
    """Arguments of the encoder, and a gradient to pull back through it."""
    rng = np.random.default_rng(seed)
    shapes = (B, D), (F, D), (F,), (D,)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def sparse(seed=0, k=4):
    """Distinct features per row; the last slot of each row is unused."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(B, k)).astype(np.float32)
    values[:, -1] = 0
    indices = np.stack([rng.permutation(F)[:k] for _ in range(B)])
    return Sparse(jnp.asarray(values), jnp.asarray(indices), F)


def pairs(seed=0):
    """Rows of any length, one of them empty; the last three pairs are unused."""
    rng = np.random.default_rng(seed)
    active = rng.uniform(size=(B, F)) < 0.15
    active[2], active[1] = False, True
    rows, features = np.nonzero(active)
    values = rng.normal(size=rows.size)
    places = np.append(rows, [0, 1, 5]), np.append(features, [F - 1, 0, 3])
    values = jnp.asarray(np.append(values, [0.0] * 3), jnp.float32)
    return Pairs(values, *map(jnp.asarray, places), B, F)


FORMS = {"Sparse": sparse, "Pairs": pairs}


def listed(codes):
    """(value, row, feature) of each slot, in its order."""
    if isinstance(codes, Pairs):
        columns = codes.values, codes.rows, codes.features
        return list(zip(*map(np.asarray, columns), strict=True))
    values, indices = map(np.asarray, (codes.values, codes.indices))
    return [(values[at], at[0], indices[at]) for at in np.ndindex(values.shape)]


def rounded(array, dtype):
    return np.asarray(jnp.asarray(array, jnp.float32).astype(dtype), np.float64)


def close(found, expected):
    """Equal but for the order of float32 sums, far below what bfloat16 rounds."""
    found = np.asarray(found)
    assert found.shape == np.shape(expected)
    size = np.abs(expected).max(initial=1e-9)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edges", [None, [7, 8, 40]])
def test_decoding_and_its_gradients_are_sums_over_slots(
    form, edges, dtype, monkeypatch
):
    """Values and rows are rounded once each; pieces of 7 leave a rest."""
    monkeypatch.setattr(pair_sums, "PIECE_CPU", 7)
    codes, (g, W_dec, _, _) = FORMS[form](), drawn(1)
    # Features on both sides of the edges.
    spread = jnp.asarray([6, 7, 8, 39])[jnp.arange(B) % 4]
    if isinstance(codes, Sparse):
        codes = codes.replace(indices=codes.indices.at[:, 0].set(spread))
        unique = [len(set(row)) for row in np.asarray(codes.indices)]
        assert min(unique) == codes.indices.shape[1], "draw again"
    share = np.arange(1.0, 2 + len(edges or []))  # slices are pulled back unequally
    share = share[: len(edges or [0])]

    def decode(values, W):
        moved = codes.replace(values=values)
        if edges is None:
            return products.decode(moved, W, dtype)[None]
        return jnp.stack(products.decode_slices(moved, W, edges, dtype))

    @jax.jit
    def all_at_once(values, W):
        found, pull = jax.vjp(decode, values, W)
        return found, *pull(jnp.asarray(share, jnp.float32)[:, None, None] * g)

    found, d_values, d_W = all_at_once(codes.values, W_dec)
    slots = listed(codes)
    wide_W, wide_values = rounded(W_dec, dtype), rounded(codes.values, dtype).ravel()
    x_hats, expected_W = np.zeros((len(share), B, D)), np.zeros((F, D))
    expected_values = np.zeros(len(slots))
    for slot, (_, row, feature) in enumerate(slots):
        part = 0 if edges is None else int(np.digitize(feature, edges))
        x_hats[part, row] += wide_values[slot] * wide_W[feature]
        pulled = share[part] * g[row].astype(np.float64)
        expected_values[slot] = pulled @ wide_W[feature]
        expected_W[feature] += wide_values[slot] * rounded(pulled, dtype)
    close(found, x_hats)
    close(np.ravel(d_values), expected_values)
    close(d_W, expected_W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*FORMS, "dense"])
def test_gradients_of_preactivations_are_sums_over_slots(form, dtype, monkeypatch):
    """Those of biases sum what was not rounded; that of x is there as well."""
    monkeypatch.setattr(pair_sums, "PIECE_CPU", 7)
    arguments = drawn(2)
    codes = pairs() if form == "dense" else FORMS[form]()
    slots = listed(codes)
    rows, features = (jnp.asarray([slot[i] for slot in slots]) for i in (1, 2))
    g = np.random.default_rng(3).normal(size=len(slots)).astype(np.float32)

    @jax.jit
    def pulled(*arguments):
        def picked(*arguments):
            if form == "dense":
                return products.preactivations(*arguments, dtype)[rows, features]
            values = jnp.arange(len(slots)) * 1.0  # any: gradients do not read them
            return products.preactivations_at(*arguments, rows, features, values, dtype)

        values, pull = jax.vjp(picked, *arguments)
        return values, pull(jnp.asarray(g))

    values, gradients = pulled(*arguments)
    x, W, b_enc, b_pre = arguments
    rows, features = np.asarray(rows), np.asarray(features)
    near, wide_W = rounded(x - b_pre, dtype), rounded(W, dtype)
    expected = [np.zeros(np.shape(a)) for a in arguments]
    dense = np.zeros((B, F), np.float32)  # one entry may be listed twice
    np.add.at(dense, (rows, features), g)
    by_slot = np.ndenumerate(dense) if form == "dense" else None
    for (row, feature), weight in by_slot or zip(
        zip(rows, features, strict=True), g, strict=True
    ):
        narrow = rounded(weight, dtype)
        expected[0][row] += narrow * wide_W[feature]
        expected[1][feature] += narrow * near[row]
        expected[2][feature] += weight
        expected[3] -= weight * W[feature].astype(np.float64)
    for ours, oracle in zip(gradients, expected, strict=True):
        close(ours, oracle)
    if form == "dense":
        close(values, (near @ wide_W.T + b_enc)[rows, features])
    else:
        np.testing.assert_array_equal(values, np.arange(len(slots)))


@pytest.mark.parametrize("rule", ["topk(k=3)", "batch_topk(k=3)"])
def test_the_gradient_by_the_input_of_a_transcoder_is_the_same_for_all_forms(
    rule, monkeypatch
):
    sae = SAE(D, F, rule=rule, d_out=3)
    variables = sae.init(jax.random.key(0))
    found = []
    for below in (0, 1.0):
        monkeypatch.setattr(select, "SPARSE_BELOW", below)

        def total(x):
            out = sae.forward(variables, x, target=x[:, :3], train=True)
            return jnp.square(out.x_hats[-1] - 1).sum()

        found.append(jax.jit(jax.grad(total))(jnp.asarray(drawn()[0])))
    assert np.abs(found[0]).max() > 0.1
    close(found[1], np.asarray(found[0]))


@pytest.mark.parametrize("n", [1, 2, 1024, 1025])
def test_pairs_of_one_target_stand_together_in_their_order(n):
    into = np.random.default_rng(4).integers(0, 300, n)
    order = pair_sums.by_target(jnp.asarray(into), 300)
    np.testing.assert_array_equal(order, np.argsort(into, kind="stable"))


def test_targets_that_do_not_fit_are_mixed_with_their_neighbours_only():
    """1000 positions take 10 bits, 30 are for targets: the lowest 8 are left out."""
    into = np.random.default_rng(5).integers(0, 2**30, 1000)
    into[::3] = into[0] + np.arange(334) % 2
    order = np.asarray(pair_sums.by_target(jnp.asarray(into), 2**30))
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert (np.diff(into[order] >> 8) >= 0).all()


def test_sums_keep_the_type_of_their_operands(x64):
    """In a float64 session, what is multiplied in float32 stays float32."""
    places = jnp.arange(3), jnp.arange(3)
    for kind in ("float32", "float64"):
        codes = Pairs(jnp.ones(3, kind), *places, B, F)
        found = products.decode(codes, jnp.ones((F, D), kind), jnp.dtype(kind))
        assert found.dtype == kind
