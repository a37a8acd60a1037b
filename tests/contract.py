"""What every sparsity rule must do, as plain functions of a bound rule.

`test_rules.py` runs each over every registered rule, built in or a user's; `bad.py`
holds, for each, a rule that breaks it and nothing else.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import sae_jax
from sae_jax import SAE, AuxK, Sparse, Variables, fold_scale, to_dense
from sae_jax.binding import BoundRule
from sae_jax.training.terms import loss_terms
from tests.compilations import compilations
from tests.conftest import planted

D, F, B = 16, 64, 24
KEY = jax.random.key(7)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
    )


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def differ(a, b) -> bool:
    return not np.allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@functools.cache
def rows(seed=0, n=B, width=D):
    """Activations with a norm of about 6, on no special scale."""
    with jax.ensure_compile_time_eval():  # kept, so never a tracer of its first caller
        key = jax.random.key(100 + seed)  # in float32, also for a caller with x64
        return 1.5 * jax.random.normal(key, (n, width), jnp.float32)


def build(bound: BoundRule, **options) -> tuple[SAE, Variables]:
    """A small SAE away from its starting point: biases, extras, norms, state."""
    sae = SAE(D, F, rule=bound, **options)
    variables = sae.init(jax.random.key(0), sample=rows(9), target_sample=rows(9))
    params = {
        name: value + 0.1 * jax.random.normal(jax.random.key(i), value.shape)
        for i, (name, value) in enumerate(sorted(variables.params.items()))
    }
    variables = variables._replace(params=params)
    if variables.state:  # memory of some batches
        for i, seed in enumerate((11, 12)):
            state = forward(sae, variables, rows(seed), train=True, step=i).state
            variables = variables._replace(state=state)
    return sae, variables


def gradient_of_model(x):
    return jnp.cos(3 * x)


def needs(sae, x):
    """All that rules may need beside rows."""
    target = rows(3, x.shape[0], sae.width_out) if sae.is_transcoder else None
    return {"target": target, "grad_x": gradient_of_model(x), "key": KEY}


@functools.cache
def program(sae, train):
    """A pass, compiled once: operation by operation, its loops would be each time."""
    return jax.jit(functools.partial(sae.forward, train=train))


def forward(sae, variables, x, *, train, **more):
    """A pass that is given all that rules may need."""
    return program(sae, train)(variables, x, **{**needs(sae, x), **more})


def codes(sae, variables, x, *, train, **more):
    return to_dense(forward(sae, variables, x, train=train, **more).codes)


def draws(bound: BoundRule) -> bool:
    return "key" in bound.rule.needs


def codes_are_well_formed(bound):
    sae, variables = build(bound)
    for train in (False, True):
        active = forward(sae, variables, rows(), train=train).codes
        if isinstance(active, Sparse):
            assert active.values.shape == active.indices.shape
            for row in np.asarray(active.indices):
                assert len(set(row)) == len(row), "an index stands twice in a row"
            assert active.indices.min() >= 0
            assert active.indices.max() < F
        dense = to_dense(active)
        assert dense.shape == (B, F)
        assert dense.dtype == jnp.float32
        assert jnp.isfinite(dense).all()
        assert (dense != 0).any()


def codes_are_signed_only_if_declared(bound):
    sae, variables = build(bound)
    for train in (False, True):
        negative = (codes(sae, variables, rows(), train=train) < 0).any()
        assert bound.rule.signed or not negative


def budget_holds_with_ties(bound):
    if bound.rule.budget is None:
        return
    limit = bound.hp[bound.rule.budget] + 1e-6
    sae, variables = build(bound)
    tied = dict(variables.params)
    thrice = jnp.arange(F) // 3  # every feature, so that scores come in triples
    for name in {"W_enc", "b_enc", "W_dec"} & tied.keys():
        tied[name] = tied[name][thrice]
    repeated = jnp.tile(rows()[:1], (B, 1))
    for params in (variables.params, tied):
        for x in (rows(), repeated):
            for n in (B, 1):
                out = forward(sae, variables._replace(params=params), x[:n], train=True)
                active = (sae_jax.codes.strengths(out.codes) != 0).sum(1)
                assert active.mean() <= limit, f"L0 {active.mean()} over {limit}"


def rows_without_positive_values_stay_finite(bound):
    sae, variables = build(bound)
    params = {**variables.params, "b_enc": jnp.full(F, -50.0)}
    if not (bound.rule.reads_b_enc and "b_enc" in variables.params):
        negative = {n: -jnp.abs(params[n]) for n in ("W_enc", "W_dec") if n in params}
        params = {**params, **negative, "b_dec": jnp.full(D, -99.0)}

    def loss(params):
        out = forward(sae, variables._replace(params=params), rows(), train=True)
        idle = jnp.zeros(F, jnp.int32)
        return sum(loss_terms(out, None, idle, None).values()), out.codes

    (value, active), grads = jax.value_and_grad(loss, has_aux=True)(params)
    assert jnp.isfinite(value)
    assert jnp.isfinite(to_dense(active)).all()
    for name, grad in grads.items():
        assert jnp.isfinite(grad).all(), name


def order_of_rows_is_irrelevant(bound):
    if draws(bound):
        return
    sae, variables = build(bound)
    order = jax.random.permutation(jax.random.key(5), B)
    for train in (False, True):
        expected = codes(sae, variables, rows(), train=train)[order]
        close(codes(sae, variables, rows()[order], train=train), expected)


def rows_are_coupled_in_training_only_if_declared(bound):
    if draws(bound):
        return
    sae, variables = build(bound)
    alone = codes(sae, variables, rows()[:5], train=True)
    together = codes(sae, variables, rows(), train=True)[:5]
    assert bound.rule.couples_batch or not differ(alone, together)


def declared_coupling_is_real(bound):
    sae, variables = build(bound)
    together = codes(sae, variables, rows(), train=True)
    alone = [codes(sae, variables, rows()[:n], train=True) for n in (2, 5)]
    coupled = any(differ(one, together[: len(one)]) for one in alone)
    assert coupled or not bound.rule.couples_batch


def evaluation_ignores_neighbours(bound):
    sae, variables = build(bound)
    together = codes(sae, variables, rows(), train=False)
    for i in (0, 7):
        alone = codes(sae, variables, rows()[i : i + 1], train=False)
        close(alone[0], together[i])


def evaluation_leaves_the_state_alone(bound):
    sae, variables = build(bound)
    same(forward(sae, variables, rows(), train=False).state, variables.state)


def randomness_is_declared_and_repeatable(bound):
    sae, variables = build(bound)
    first = codes(sae, variables, rows(), train=True, key=jax.random.key(1))
    again = codes(sae, variables, rows(), train=True, key=jax.random.key(1))
    other = codes(sae, variables, rows(), train=True, key=jax.random.key(2))
    same(first, again)
    assert differ(first, other) == draws(bound)
    evaluated = [
        codes(sae, variables, rows(), train=False, key=jax.random.key(i))
        for i in (1, 2)
    ]
    same(*evaluated)


def gradients_of_the_model_decide_if_needed(bound):
    """And where there are none, rows are encoded all the same."""
    sae, variables = build(bound)
    encode = functools.partial(sae.encode, variables, rows())
    one, other = (encode(grad_x=gradient_of_model(rows(i))) for i in (0, 5))
    assert differ(to_dense(one), to_dense(other)) == ("grad_x" in bound.rule.needs)
    assert jnp.isfinite(to_dense(encode())).all()


def every_parameter_learns(bound):
    sae, variables = build(bound)
    optional = set() if bound.rule.reads_b_enc else {"b_enc"}

    def loss(params):
        out = forward(sae, variables._replace(params=params), rows(), train=True)
        idle = jnp.zeros(F, jnp.int32)
        return sum(loss_terms(out, None, idle, None).values())

    for name, grad in jax.grad(loss)(variables.params).items():
        assert jnp.isfinite(grad).all(), name
        assert (grad != 0).any() or name in optional, f"{name} gets no gradient"


def jit_changes_nothing(bound):
    sae, variables = build(bound)
    plain, fast = (
        run(variables, rows(), **needs(sae, rows()))
        for run in (functools.partial(sae.forward, train=True), program(sae, True))
    )
    close(to_dense(plain.codes), to_dense(fast.codes))
    close(plain.x_hats[-1], fast.x_hats[-1])
    for name, penalty in plain.penalties.items():
        close(penalty.per_row, fast.penalties[name].per_row)


def traced_knobs_and_ensembles_equal_solo_runs(bound):
    """Members of an ensemble differ in parameters and, where it may, in the knob."""
    rule = bound.rule
    sae, variables = build(bound)
    top = bound.hp[rule.knob]
    values = [top, top // 2 if isinstance(top, int) else top / 2]
    others = jax.tree.map(lambda p: p * 0.9, variables.params)
    members = [variables, variables._replace(params=others)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    @jax.jit
    @jax.vmap
    def together(variables, knob):
        knob = knob if rule.knob in rule.traced else None
        return codes(sae, variables, rows(), train=True, knob=knob)

    found = together(stacked, jnp.asarray(values, jnp.float32))
    for i, (member, value) in enumerate(zip(members, values, strict=True)):
        alone = bound
        if rule.knob in rule.traced:
            alone = sae_jax.binding.bind(rule, {**bound.hp, rule.knob: value})
        solo = dataclasses.replace(sae, rule=alone)
        expected = jax.jit(functools.partial(codes, solo, train=True))(member, rows())
        close(found[i], expected)


def bfloat16_is_kept_to_the_products(bound):
    sae, variables = build(bound, dtype="bfloat16")
    x = rows().astype(jnp.bfloat16)
    out = sae.apply(variables, x)
    assert out.x_hat.dtype == jnp.bfloat16
    assert to_dense(out.codes).dtype == jnp.bfloat16
    trained = forward(sae, variables, x, train=True)
    for name, term in loss_terms(trained, None, jnp.zeros(F, int), AuxK()).items():
        assert term.dtype == jnp.float32, f"loss term {name} is {term.dtype}"
    for name, value in trained.state.items():
        assert value.dtype == variables.state[name].dtype, name


def masked_rows_do_not_count(bound):
    if draws(bound):
        return
    sae, variables = build(bound)
    mask = jnp.arange(B) % 3 != 1
    x = jnp.where(mask[:, None], rows(), 50 * rows(4))
    masked = forward(sae, variables, x, train=True, mask=mask)
    removed = forward(sae, variables, x[mask], train=True)
    close(to_dense(masked.codes)[mask], to_dense(removed.codes))
    jax.tree.map(close, masked.state, removed.state)
    idle = jnp.full(F, 99)
    terms = loss_terms(masked, mask, idle, AuxK(k=4))
    for name, term in loss_terms(removed, None, idle, AuxK(k=4)).items():
        close(terms[name], term)


def features_have_no_order(bound):
    """Renaming features renames codes (the reconstruction may well care)."""
    if draws(bound):
        return
    sae, variables = build(bound)
    order = jax.random.permutation(jax.random.key(6), F)

    def renamed(leaf):
        for axis, size in enumerate(leaf.shape):
            if size == F:
                leaf = jnp.take(leaf, order, axis=axis)
        return leaf

    for train in (False, True):
        expected = codes(sae, variables, rows(), train=train)[:, order]
        shuffled = jax.tree.map(renamed, variables)
        close(codes(sae, shuffled, rows(), train=train), expected)


def constant_scale_folds_into_weights(bound):
    sae, variables = build(bound, treatment="scale")
    if bound.rule.fold is None:
        return
    plain, folded = fold_scale(sae, variables)
    before, after = sae.apply(variables, rows()), plain.apply(folded, rows())
    close(to_dense(before.codes), to_dense(after.codes))
    close(before.x_hat, after.x_hat)


def transcoders_work_unless_excluded(bound):
    if "autoencoder" in bound.rule.needs:
        return
    sae, variables = build(bound, d_out=12)
    out = forward(sae, variables, rows(), train=True)
    assert out.x_hats[-1].shape == (B, 12)
    terms = loss_terms(out, None, jnp.zeros(F, int), None)
    assert all(jnp.isfinite(term) for term in terms.values())
    assert sae.apply(variables, rows()).x_hat.shape == (B, 12)


@functools.cache
def planted_rows():
    x, _, _ = planted(D, 24, 0.1, 2500)
    return x[(x != 0).any(1)][:2048]  # NumPy: a cache must not hold traced values


def batch_at(i):
    x = jnp.roll(planted_rows(), -64 * i, axis=0)[:64]
    return {"x": x, "grad": gradient_of_model(x)}


@functools.cache
def train(bound, steps=120):
    """Trains on planted data: states before and after, metrics, compilations."""
    sae = SAE(D, F, rule=bound)
    optimiser = sae_jax.adam(sae_jax.learning_rate(5e-3, steps, warmup=2))
    start = jax.eval_shape(lambda: sae_jax.init_state(sae, optimiser, KEY))
    state = sae_jax.init_state(sae, optimiser, KEY)
    step = sae_jax.make_step(sae, optimiser)
    history = []
    with compilations("step") as compiled:
        for i in range(steps):
            state, metrics = step(state, batch_at(i))
            history.append(metrics)
    return start, state, jax.device_get(history), len(compiled)


def training_compiles_once_and_keeps_types(bound):
    start, state, _, times = train(bound)
    assert times == 1, f"compiled {times} times"
    jax.tree.map(
        lambda a, b: same((a.shape, a.dtype), (b.shape, b.dtype)), start, state
    )


def training_lowers_the_error(bound):
    _, _, history, _ = train(bound)
    first, last = history[0]["loss_mse"], history[-1]["loss_mse"]
    assert last < 0.9 * first, f"mse went from {first} to {last}"
    assert all(metrics["finite"] for metrics in history)


def knob_moves_sparsity_as_declared(bound):
    rule = bound.rule
    if rule.knob not in rule.traced or rule.knob_raises_l0 is None:
        return
    value = bound.hp[rule.knob]
    sae = SAE(D, F, rule=bound)

    @jax.jit
    def descend(variables, i, knob):
        def loss(params):
            batch = batch_at(i)
            out = sae.forward(
                variables._replace(params=params),
                batch["x"],
                grad_x=batch["grad"],
                key=jax.random.fold_in(KEY, i),
                step=i,
                train=True,
                knob=knob,
            )
            idle = jnp.zeros(F, jnp.int32)
            return sum(loss_terms(out, None, idle, None).values()), out

        grads, out = jax.grad(loss, has_aux=True)(variables.params)
        signs = jax.tree.map(jnp.sign, grads)  # as Adam's first steps
        params = jax.tree.map(lambda p, s: p - 3e-3 * s, variables.params, signs)
        l0 = sae_jax.codes.l0(out.codes).mean()
        return variables._replace(params=params, state=out.state), l0

    def l0_after_training(knob):
        variables = sae.init(KEY)
        for i in range(60):
            variables, l0 = descend(variables, i, jnp.float32(knob))
        return float(l0)

    low, high = (value / 2, value) if rule.budget else (value / 10, value * 10)
    l0 = [l0_after_training(knob) for knob in (low, high)]
    assert l0[0] != l0[1]
    assert (l0[0] < l0[1]) == rule.knob_raises_l0, f"L0 {l0} at {low}, {high}"


CHECKS = [
    codes_are_well_formed,
    codes_are_signed_only_if_declared,
    budget_holds_with_ties,
    rows_without_positive_values_stay_finite,
    order_of_rows_is_irrelevant,
    rows_are_coupled_in_training_only_if_declared,
    declared_coupling_is_real,
    evaluation_ignores_neighbours,
    evaluation_leaves_the_state_alone,
    randomness_is_declared_and_repeatable,
    gradients_of_the_model_decide_if_needed,
    every_parameter_learns,
    jit_changes_nothing,
    traced_knobs_and_ensembles_equal_solo_runs,
    bfloat16_is_kept_to_the_products,
    masked_rows_do_not_count,
    features_have_no_order,
    constant_scale_folds_into_weights,
    transcoders_work_unless_excluded,
    training_compiles_once_and_keeps_types,
    training_lowers_the_error,
    knob_moves_sparsity_as_declared,
]
