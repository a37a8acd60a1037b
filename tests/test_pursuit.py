"""Matching pursuit: the path of a row, its gradients, what it holds; the tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import sae_jax
from sae_jax import SAE, AuxK, Variables, fold_scale, pursuit, to_dense
from sae_jax.pursuit import Stop
from sae_jax.training.terms import loss_terms
from tests import tree
from tests.contract import KEY, close, rows


def drawn(seed, b=40, d=12, f=30, unit=True):
    """Rows and atoms, in NumPy."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(f, d))
    if unit:
        atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return rng.normal(size=(b, d)), atoms


NEVER = Stop()


@functools.partial(jax.jit, static_argnums=(3, 4))
def walked(x, atoms, count, count_max, stop=NEVER):
    return pursuit.pursue(x, atoms, count, count_max, stop, x.dtype)


def path(x, atoms, count, stop=NEVER, count_max=None):
    x, atoms = jnp.asarray(x), jnp.asarray(atoms)
    return walked(x, atoms, count, count_max or count, stop)


merged = jax.jit(pursuit.merged, static_argnums=1)


def codes(found, f):
    return np.asarray(to_dense(merged(found, f)))


# The path


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_shrinks_and_is_orthogonal_to_what_was_taken(seed):
    x, atoms = (a.astype(np.float32) for a in drawn(seed))
    before, everywhere = np.linalg.norm(x, axis=1), np.arange(len(x))
    for n in range(1, 7):
        found = path(x, atoms, n, count_max=6)
        left = x - codes(found, 30) @ atoms
        last = np.asarray(found.picks)[everywhere, n - 1]
        along = (left * atoms[last]).sum(1)
        assert np.abs(along[last >= 0]).max() < 1e-5
        assert (last >= 0).mean() > 0.9
        length = np.linalg.norm(left, axis=1)
        assert (length <= before).all()
        assert (length < 0.999 * before).mean() > 0.9
        before = length


def test_the_length_of_atoms_moves_into_codes(x64):
    x, atoms = drawn(0)
    lengths = np.linspace(0.2, 5, 30)[:, None]
    expected, found = (codes(path(x, a, 8), 30) for a in (atoms, lengths * atoms))
    np.testing.assert_allclose(found * lengths.T, expected, rtol=0, atol=1e-12)


def test_a_row_stops_where_nothing_points_along_it():
    atoms = np.eye(6, 3) - 2 * np.eye(6, 3, -3)  # e_0 e_1 e_2, -2e_0 -2e_1 -2e_2
    x = np.array([[2, -3, 0.5], [0, 0, 0], [0, 0, 1]])
    found = path(x, atoms, 5)
    picks = [[4, 0, 2, -1, -1], [-1] * 5, [2, -1, -1, -1, -1]]
    np.testing.assert_array_equal(found.picks, picks)
    taken = [[1.5, 2, 0.5, 0, 0], [0] * 5, [1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(found.coefficients, taken)
    only_up = path(-np.abs(x), atoms[:3], 5)
    assert not only_up.coefficients.any(), "the maximum is signed"
    assert not path(x, 0 * atoms, 2).coefficients.any(), "atoms of zeros"


def test_rounding_errors_are_not_explained():
    x, atoms = (a.astype(np.float32) for a in drawn(3, d=8, f=8))
    atoms = np.linalg.qr(atoms)[0]
    x = np.abs(x) @ atoms
    found = path(x, atoms, 8)
    assert (found.picks >= 0).all()
    more = path(x, np.concatenate([atoms, -atoms]), 14)
    assert ((np.asarray(more.picks) >= 0).sum(1) == 8).all()


def test_atoms_taken_again_have_one_code_and_no_index_stands_twice():
    x, atoms = drawn(4, b=200, d=3, f=12)
    for count in (3, 8, 12):
        found = path(x, atoms, count, count_max=12)
        picks = np.asarray(found.picks)
        repeats = sum(len(set(p)) < len(p) for p in (row[row >= 0] for row in picks))
        assert repeats > 50 or count == 3
        for row in np.asarray(merged(found, 12).indices):
            assert len(set(row)) == 12
            assert row.min() >= 0
            assert row.max() < 12
        expected = np.zeros((200, 12))
        for b, t in np.ndindex(picks.shape):
            if picks[b, t] >= 0:
                expected[b, picks[b, t]] += found.coefficients[b, t]
        close(codes(found, 12), expected)


@pytest.mark.parametrize("stop", [Stop(below=1.5), Stop(on_repeat=True)])
def test_rows_stop_on_their_own(stop):
    x, atoms = drawn(5, b=60, d=6, f=20)
    whole = path(x, atoms, 10)
    found = path(x, atoms, 10, stop)
    counts = []
    for b, picks in enumerate(np.asarray(whole.picks)):
        left, taken = x[b], []
        for t, pick in enumerate(picks):
            if pick < 0:
                break
            left = left - whole.coefficients[b, t] * atoms[pick]
            taken.append(pick)
            again = pick in taken[:-1]
            if np.linalg.norm(left) < stop.below or (stop.on_repeat and again):
                break
        n = len(taken)
        counts.append(n)
        np.testing.assert_array_equal(found.picks[b, :n], taken)
        assert (found.picks[b, n:] == -1).all()
        assert not found.coefficients[b, n:].any()
    assert len(set(counts)) > 2


def test_rows_of_a_large_batch_are_walked_in_pieces():
    x, atoms = drawn(6, b=2 * pursuit.ROWS_AT_ONCE + 5, d=5)
    found, expected = path(x, atoms, 4), path(x[-7:], atoms, 4)
    jax.tree.map(lambda a, b: close(a[-7:], b), found, expected)


# Gradients


def dense(x, atoms, k):
    """Codes as one would write them first, for autodiff."""

    def step(carry, _):
        codes, left = carry
        along = left @ atoms.T / jnp.linalg.norm(atoms, axis=1)
        best = jnp.argmax(jax.lax.stop_gradient(along), axis=1)
        atom = atoms[best]
        c = jax.nn.relu((atom * left).sum(1) / (atom * atom).sum(1))
        codes = codes.at[jnp.arange(len(x)), best].add(c)
        return (codes, left - c[:, None] * atom), None

    start = jnp.zeros((len(x), len(atoms))), x
    return jax.lax.scan(step, start, length=k)[0][0]


@pytest.mark.parametrize(("d", "k"), [(12, 5), (3, 12)])
def test_gradients_are_those_of_the_unrolled_loop(d, k, x64):
    x, atoms = map(jnp.asarray, drawn(7, d=d, unit=False))
    weigh = jnp.asarray(np.random.default_rng(8).normal(size=(40, 30)))

    def ours(x, atoms):
        return to_dense(pursuit.merged(walked(x, atoms, k, k), 30))

    def loss(encode, x, atoms):
        return (jnp.sin(encode(x, atoms)) * weigh).sum()

    close(ours(x, atoms), dense(x, atoms, k), 1e-12)
    unrolled = functools.partial(dense, k=k)
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, encode), argnums=(0, 1)))(x, atoms)
        for encode in (ours, unrolled)
    )
    for a, b in zip(found, expected, strict=True):
        assert (b != 0).mean() > 0.5
        close(a, b, 1e-11)


def test_dead_atoms_learn_from_aux_k_where_it_is_asked_for():
    sae = SAE(16, 64, "matching_pursuit(k=4)")
    variables = sae.init(KEY)
    idle = jnp.where(jnp.arange(64) < 10, 99, 0)

    def aux(params):
        out = sae.forward(variables._replace(params=params), rows(), train=True)
        return loss_terms(out, None, idle, AuxK(k=4))["aux"]

    grads = jax.grad(aux)(variables.params)
    assert not sae.bound.rule.aux_k
    assert (grads["W_dec"][:10] != 0).any()
    assert not grads["W_dec"][10:].any()


# What it holds and computes

B, D, F = 256, 32, 8192  # so wide that selecting takes less than a product
CODES = 4 * B * F


@functools.cache
def compiled(k, gradients):
    sae = SAE(D, F, f"matching_pursuit(k={k})")

    def loss(params, x):
        out = sae.forward(Variables(params, {}, {}), x, train=True)
        return loss_terms(out, None, jnp.zeros(F, jnp.int32), None)["mse"]

    given = sae.shapes().params, jax.ShapeDtypeStruct((B, D), jnp.float32)
    return jax.jit(jax.grad(loss) if gradients else loss).lower(*given).compile()


@pytest.mark.parametrize("gradients", [False, True])
def test_products_of_one_step_exist_at_a_time(gradients):
    few, many = (
        compiled(k, gradients).memory_analysis().temp_size_in_bytes for k in (2, 32)
    )
    assert CODES <= few <= many < 2.5 * CODES, (few / CODES, many / CODES)
    assert many - few < CODES / 2


def test_the_first_step_is_no_product_more():
    """The body of a loop is counted once; `encoder.pre`, which nobody reads, never."""
    product = 2 * B * D * F
    assert product < compiled(32, False).cost_analysis()["flops"] < 1.9 * product


# Other numbers of steps, other units


def test_more_steps_never_raise_the_error_as_more_of_topk_do():
    x = rows(0, 200)
    rises = {}
    for rule in ("matching_pursuit", "topk"):
        sae = SAE(16, 64, f"{rule}(k=2)").up_to(32)
        variables = sae.init(KEY)

        @jax.jit
        def errors(k, sae=sae, variables=variables):
            out = sae.forward(variables, x, knob=k)
            return jnp.square(out.x_hats[-1] - x).sum(1)

        found = [errors(float(k)) for k in (1, 2, 3, 4, 8, 16, 32)]
        rises[rule] = np.diff(found, axis=0)
    assert rises["matching_pursuit"].max() < 1e-5
    assert rises["topk"][-1].mean() > 1


def test_lengths_are_folded_with_the_scale():
    rule = "matching_pursuit(k=6, tau=2.0)"
    sae = SAE(16, 64, rule, treatment="scale")
    x = 9 * rows()
    variables = sae.init(KEY, sample=x)
    plain, folded = fold_scale(sae, variables)
    before, after = sae.apply(variables, x), plain.apply(folded, x)
    close(to_dense(before.codes), to_dense(after.codes))
    close(before.x_hat, after.x_hat)
    counts = (to_dense(before.codes) != 0).sum(1)
    assert counts.min() < 5, "some rows stop early"
    assert plain.bound.hp["tau"] > 2 * sae.bound.hp["tau"]
    assert sae_jax.parse(plain.bound.spec).hp == plain.bound.hp


# The tree: parents with children, siblings of some cosine


def test_the_tree_is_as_the_authors_describe_it():
    # Their eps for a cosine: three children, eleven top nodes.
    for m, table in ((3, {0.1: 0.0895, 0.3: 0.226, 0.8: 0.482}), (11, {0.1: 0.3})):
        for cosine, eps in table.items():
            q = np.eye(m)
            theirs = (1 - eps) * q + eps / (m - 1) * (1 - q)
            theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
            np.testing.assert_allclose(tree.mixed(q, cosine), theirs, atol=2e-3)
    directions = tree.directions(cosine=0.3, seed=1)
    codes = np.asarray(tree.codes(KEY, 20_000))
    cosines = directions @ directions.T
    family = np.repeat([0, 1, 2, 3], [11, 3, 3, 3])
    within = family[:, None] == family
    expected = np.where(within, 0.3, 0) + 0.7 * np.eye(20)
    np.testing.assert_allclose(cosines, expected, atol=1e-12)
    on = codes != 0
    assert (on[:, :11].sum(1) == 1).all()
    assert pytest.approx(1.36) == tree.MEAN_L0
    assert on.sum(1).mean() == pytest.approx(tree.MEAN_L0, abs=0.02)
    for parent in range(3):
        with_child = on[:, tree.children(parent)].sum(1)
        assert with_child.max() == 1
        assert not (with_child > on[:, parent]).any()
    assert codes[on].mean() == pytest.approx(1.5, abs=0.01)
    assert codes[on].std() == pytest.approx(0.25, abs=0.01)


def grown(rule, cosine, n_seeds, steps=6000):
    """Trains seeds side by side; of each FVU, cosines with the truth, absorption.

    Adam with 1e-2, batches of 512 rows, none of which comes twice. Features are matched
    by their normalised activations. Absorption: cosines of children with their parent's
    true direction.
    """
    planted = [tree.directions(cosine, seed) for seed in range(n_seeds)]
    sae, optimiser = SAE(tree.N, tree.N, rule), sae_jax.adam(1e-2, clip=None)
    step = sae_jax.make_step(sae, optimiser, aux=None, jit=False)

    @jax.jit
    @jax.vmap
    def trained(key, directions):
        def one(state, key):
            return step(state, {"x": tree.codes(key, 512) @ directions})[0], None

        state = sae_jax.init_state(sae, optimiser, key)
        return jax.lax.scan(one, state, jax.random.split(key, steps))[0].variables

    keys = jnp.stack([jax.random.key(seed) for seed in range(n_seeds)])
    together = trained(keys, jnp.asarray(np.stack(planted), jnp.float32))
    forward, scores = jax.jit(sae.forward), []
    for seed, directions in enumerate(planted):
        variables = jax.tree.map(lambda leaf, i=seed: leaf[i], together)
        true = np.asarray(tree.codes(jax.random.key(100 + seed), 20_000))
        x = (true @ directions).astype(np.float32)
        out = forward(variables, jnp.asarray(x))
        error = np.square(np.asarray(out.x_hats[-1]) - x).sum()
        found = np.asarray(to_dense(out.codes))
        found = found / np.maximum(np.linalg.norm(found, axis=0), 1e-9)
        alike = (true / np.linalg.norm(true, axis=0)).T @ found
        W_dec = np.asarray(variables.params["W_dec"])
        W_dec = W_dec[linear_sum_assignment(-alike)[1]]
        absorbed = [W_dec[tree.children(p)] @ directions[p] for p in range(3)]
        fvu = error / np.square(x - x.mean(0)).sum()
        scores.append((fvu, (W_dec * directions).sum(1).mean(), np.mean(absorbed)))
        print(f"{rule} {cosine} seed {seed}:", end=" ")
        print("FVU {:.1e} cosine {:.4f} absorbed {:.3f}".format(*scores[-1]))
    return np.array(scores).T


@pytest.mark.slow
@pytest.mark.parametrize(("cosine", "least"), [(0.0, 0.99), (0.1, 0.95), (0.3, 0.95)])
def test_the_tree_is_found(cosine, least):
    fvu, found, absorbed = grown("matching_pursuit(k=3)", cosine, 6)
    assert found.min() >= least
    assert fvu.max() < 1e-4
    assert absorbed.max() < 0.1


@pytest.mark.slow
def test_with_an_l1_penalty_children_are_part_of_their_parents():
    # 0.15 on a loss summed over width.
    _, _, absorbed = grown(f"relu(coef={0.15 / tree.N})", 0.0, 2)
    assert absorbed.min() > 0.5
    assert absorbed.max() < 0.62
