"""Gradients of the model beside its activations, from the text to the trained SAE."""

import dataclasses
import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import SAE, Member, Recipe, TrainedSAE, gradient_of
from sae_jax.activations import FromShards, Harvester, Shards
from sae_jax.activations.in_memory import InMemory
from sae_jax.activations.shards import ShardError
from sae_jax.evaluation import Evaluator, HeldOut, Measurement
from sae_jax.fit import train, train_many
from sae_jax.model import WithoutGradient, say_without_gradient
from sae_jax.run.in_folder import train_in_folder
from sae_jax.run.loop import Every
from sae_jax.share import Share, joined
from sae_jax.text.blocks import blocks
from sae_jax.text.contexts import contexts
from sae_jax.training.step import init_state
from tests.contract import same
from tests.test_spliced import LOSS, splice_one_by_one
from tests.toys import (
    DOCUMENTS,
    PACKING,
    SITES,
    TOKENS,
    on_the_fly,
    run_harvest,
    toy_harvester,
    toy_lm,
)

NEAR, FAR = SITES
GRADIENT = gradient_of(NEAR)
GRADED = Harvester(toy_lm(), SITES, contexts_per_pass=4, gradients=(NEAR,))
RULE = "gradient_topk(k=2, beta=0.5)"
NEARLY = 2e-5  # two float32 programs, gradients of sums of seven losses


def plain_rows(n):
    """The first n used rows of the text and their gradients, one context at a time."""
    found = {NEAR: [], GRADIENT: []}
    for context in contexts(DOCUMENTS, TOKENS, PACKING):
        run, gradients = toy_lm().gradients(context.tokens[None], (NEAR,))
        for name, value in ((NEAR, run.values[NEAR]), (GRADIENT, gradients[NEAR])):
            found[name].extend(np.asarray(value[0])[context.use])
        if len(found[NEAR]) >= n:
            return {name: np.stack(rows)[:n] for name, rows in found.items()}
    raise AssertionError


def test_a_rows_gradient_is_that_of_the_losses_of_its_own_context():
    """Padding, other contexts and the number of contexts at once change nothing."""
    apart = PACKING._replace(join=False, repeat=False)
    block = next(blocks(DOCUMENTS, TOKENS, apart, 30))
    assert 0 < block.real.sum() < block.real.size
    found, without = GRADED.rows(block), toy_harvester().rows(block)
    assert set(found) == {*SITES, GRADIENT} == set(GRADED.widths)
    for i, (row, column) in enumerate(zip(block.row, block.column, strict=True)):
        tokens = block.tokens[row][block.real[row]]
        _, alone = toy_lm().gradients(tokens[None], (NEAR,))
        expected = np.asarray(alone[NEAR])[0, column]
        np.testing.assert_allclose(found[GRADIENT][i], expected, atol=NEARLY)
        assert expected.any() == (column < len(tokens) - 1)
    for site in SITES:
        np.testing.assert_allclose(found[site], without[site], atol=2e-6)


def test_batches_hold_the_same_rows_in_the_same_order_with_gradients_beside():
    expected = plain_rows(100)
    graded, plain = on_the_fly(harvester=GRADED), on_the_fly()
    assert set(plain.widths) == set(SITES)
    assert graded.widths == plain.widths | {GRADIENT: 16}
    for more, less in itertools.islice(zip(graded.batches(), plain.batches()), 9):  # noqa: B905
        for site in SITES:
            np.testing.assert_allclose(more[site], less[site], atol=2e-6)
        distance = np.abs(np.asarray(more[NEAR])[:, None] - expected[NEAR]).max(-1)
        gradients = expected[GRADIENT][distance.argmin(1)]
        np.testing.assert_allclose(more[GRADIENT], gradients, atol=NEARLY)
    # Positions of streams without gradients are what they have always been.
    assert plain.position(8)["made_by"]["sites"] == plain.widths
    with pytest.raises(ValueError, match=r"another stream: sites was .*gradient of"):
        plain.batches(0, graded.position(8) | {"group": 0})


@pytest.mark.parametrize("readers", [1, 2])
def test_with_gradients_a_stream_resumes_bit_for_bit(readers):
    def opened(share=Share()):  # noqa: B008
        return on_the_fly(harvester=GRADED, readers=readers, share=share)

    whole, seen, positions = opened(), [], []
    for t, batch in enumerate(itertools.islice(whole.batches(), 10)):
        seen.append(batch)
        positions.append(json.loads(json.dumps(whole.position(t))))
    for start in (0, 3, 6):
        again = opened().batches(start, positions[start])
        for batch, before in zip(again, seen[start:], strict=False):
            same(batch, before)
    if readers == 1:
        return
    shares = [opened(Share(i, 2)) for i in range(2)]
    parts = [next(share.batches(3, positions[3])) for share in shares]
    same({n: jnp.concatenate([p[n] for p in parts]) for n in seen[3]}, seen[3])
    assert joined([share.position(3) for share in shares]) == positions[3]


def test_shards_hold_gradients_beside_their_sites(tmp_path):
    for rows in (20, 40, 50):  # stopped and gone on with, at whole shards
        run_harvest(tmp_path / "graded", rows, harvester=GRADED)
    run_harvest(tmp_path / "whole", 50, harvester=GRADED)
    shards, whole = Shards(tmp_path / "graded"), Shards(tmp_path / "whole")
    assert [e.sha256 for e in shards.manifest["shards"]] == [
        e.sha256 for e in whole.manifest["shards"]
    ]
    stored, expected = shards.rows(np.arange(50), (NEAR, GRADIENT)), plain_rows(50)
    for name, rows in expected.items():
        np.testing.assert_allclose(stored[name], rows, atol=NEARLY)
    names = (NEAR, GRADIENT)
    stream = FromShards(shards, batch=10, sites=names)
    assert stream.widths == {NEAR: 16, GRADIENT: 16}
    batches = list(itertools.islice(stream.batches(), 7))
    alone = FromShards(shards, batch=10, sites=(NEAR,))
    for t, (with_it, without) in enumerate(zip(batches, alone.batches(), strict=False)):
        same(with_it[NEAR], without[NEAR])
        same(next(stream.batches(t, stream.position(t))), with_it)
    with pytest.raises(ShardError, match=r"another harvest: .*sites was"):
        run_harvest(tmp_path / "graded", 60)
    rows = 10
    needed = rows * (4 * (16 + 64 + 16) + 16)
    with pytest.raises(ShardError, match="harvest fewer"):
        run_harvest(
            tmp_path / "full", rows, harvester=GRADED, free=lambda _: needed - 1
        )


RNG = np.random.default_rng(0)
A, G = (RNG.normal(size=(96, 8)).astype(np.float32) for _ in range(2))
ARRAYS = {"x": A, gradient_of("x"): G}
RECIPE = Recipe(steps=9, lr=1e-2, warmup=2)


def test_the_loop_gives_each_step_the_gradients_that_its_rule_needs():
    """A member is trained as by plain steps, the others as if there were none."""
    members = {
        "graded": Member(SAE(8, 16, RULE), "x"),
        "off": Member(SAE(8, 16, "gradient_topk(k=2, beta=0.0)"), "x"),
        "plain": Member(SAE(8, 16, "topk(k=2)"), "x"),
    }
    found = train_many(ARRAYS, members, RECIPE, batch=12, progress=False)
    alone = train(A, "topk(k=2)", n_features=16, recipe=RECIPE, batch=12)
    same(found["plain"].variables, alone.variables)
    same(found["off"].variables, alone.variables)
    sae = members["graded"].sae
    step = RECIPE.make_step(sae)
    state = init_state(sae, RECIPE.optimiser(), jax.random.key(0))
    for rows in itertools.islice(InMemory(ARRAYS, batch=12).batches(), RECIPE.steps):
        batch = {"x": rows["x"], "grad": rows[gradient_of("x")]}
        state, _ = step(state, batch)
    same(found["graded"].variables, state.variables)
    W_enc, other = (v.params["W_enc"] for v in (state.variables, alone.variables))
    assert (W_enc != other).any()


def test_arrays_and_iterators_may_bring_gradients_along():
    options = {"n_features": 16, "recipe": RECIPE, "progress": False}
    of_arrays = train(ARRAYS, RULE, batch=12, **options)
    batches = itertools.islice(InMemory(ARRAYS, batch=12).batches(), RECIPE.steps)
    of_iterator = train(batches, RULE, **options)
    same(of_arrays.variables, of_iterator.variables)


@pytest.mark.usefixtures("as_users")
def test_a_rule_that_needs_gradients_is_refused_where_there_are_none():
    with pytest.raises(ValueError, match=r"the model's gradient at x, and .* --gradie"):
        train(A, RULE, n_features=16, batch=12, progress=False)
    narrow = {"x": A, gradient_of("x"): G[:, :4]}
    with pytest.raises(ValueError, match="gradient of x is 4 wide, the SAE is made fo"):
        train(narrow, RULE, n_features=16, batch=12, progress=False)
    with pytest.raises(ValueError, match=r"gradients=.*mlp_out\.0 is not read; add it"):
        Harvester(toy_lm(), SITES, gradients=("mlp_out.0",))


class Stopped(Exception):
    """What stops a run here."""


def test_a_run_with_gradients_goes_on_bit_for_bit(tmp_path):
    """Stopped during an evaluation between two checkpoints."""
    members = {
        "graded": Member(SAE(16, 32, RULE), NEAR),
        "plain": Member(SAE(64, 32, "topk(k=2)"), FAR),
    }

    def run(folder, evaluate):
        trained = train_in_folder(
            folder,
            {},
            members,
            on_the_fly(harvester=GRADED, readers=2),
            Recipe(steps=13, lr=1e-2),
            every=Every(log=3, evaluate=4, save=3),
            evaluate=evaluate,
            progress=False,
        )
        return [trained[name].variables for name in members]

    def stopping(name, sae, variables):
        if next(counted) == 3:
            raise Stopped
        return {}

    whole, counted = run(tmp_path / "whole", lambda *_: {}), itertools.count()
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stopping)
    same(run(tmp_path / "stopped", lambda *_: {}), whole)
    logs = [(tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "stopped")]
    assert logs[0] == logs[1]


def gradient_sae(beta=100.0):
    sae = SAE(16, 64, rule=f"gradient_topk(k=3, {beta=})")
    return sae, sae.init(jax.random.key(4))


def test_an_evaluation_measures_the_gap():
    """With gradients against single contexts; without, it is that of plain TopK."""
    packing = PACKING._replace(join=False, skip=1)
    heldout = HeldOut.read(DOCUMENTS, TOKENS, packing, 7)
    sae, variables = gradient_sae()
    evaluator = Evaluator(toy_lm(), heldout, contexts_per_pass=3)
    found = evaluator(sae, variables, NEAR).scores
    plain = evaluator(SAE(16, 64, rule="topk(k=3)"), variables, NEAR).scores
    assert {n: v for n, v in found.items() if n in plain} == plain
    x, g = np.zeros((2, *heldout.tokens.shape, 16), np.float32)
    for i, (tokens, real) in enumerate(zip(heldout.tokens, heldout.real, strict=True)):
        run, gradients = toy_lm().gradients(tokens[real][None], (NEAR,))
        x[i, real], g[i, real] = run.values[NEAR][0], gradients[NEAR][0]
    flat_x, flat_g = (jnp.asarray(a.reshape(-1, 16)) for a in (x, g))
    x_hat = sae.apply(variables, flat_x, grad_x=flat_g).x_hat.reshape(x.shape)
    loss, divergence = splice_one_by_one(heldout, NEAR, x_hat)
    rows = {"x": x[heldout.use], "grad_x": g[heldout.use]}
    measured = Measurement(sae, variables, rows["x"].mean(0))
    measured.add(jnp.asarray(rows["x"]), grad_x=jnp.asarray(rows["grad_x"]))
    alone = measured.finish().scores
    expected = {name: alone[name] for name in ("l0", "nmse", "dead")}
    expected |= {"loss_spliced": loss, "kl_spliced": divergence}
    ruin = found["loss_zero"]
    expected["loss_recovered"] = (ruin - loss) / (ruin - found["loss_clean"])
    assert {n for n in found if n not in plain} == {
        f"{name}_with_gradients" for name in expected
    }
    for name, value in expected.items():
        close = LOSS
        if name == "loss_recovered":
            close = 4 * LOSS / abs(ruin - found["loss_clean"])
        off = abs(found[f"{name}_with_gradients"] - value)
        assert off < close, f"{name} is off by {off}"
        if name not in ("l0", "dead"):
            assert abs(found[name] - value) > 2 * close, f"{name} does not tell"


def test_that_an_sae_encodes_without_gradients_is_said_once():
    say_without_gradient.cache_clear()
    one = TrainedSAE(*gradient_sae())
    x, g = (jnp.asarray(np.hstack([a, a[::-1]])) for a in (A, G))
    with warnings.catch_warnings():
        warnings.simplefilter("error", WithoutGradient)
        graded = [one(x, grad_x=g)[1], one.encode(x, grad_x=np.asarray(g))]
        SAE(16, 64, rule="topk(k=3)").encode(one.variables, x)
    same(*graded)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            codes = [one(x)[1], one.encode(x), one.sae.encode(one.variables, x)]
    assert [str(w.message) for w in said if w.category is WithoutGradient] == [
        "gradient_topk was trained with gradients of the model's loss and encodes rows "
        "without them by the k largest pre-activations, as plain TopK. Pass grad_x if "
        "you have it; an Evaluator measures what that changes."
    ]
    same(codes[0], codes[1])
    plain = dataclasses.replace(one.sae, rule="topk(k=3)")
    same(codes[2], plain.encode(one.variables, x))
    assert (codes[0] != graded[0]).any()


def test_a_rule_says_what_it_does_without_gradients():
    rule = sae_jax.RULES["topk"]
    with pytest.raises(ValueError, match="needs 'grad_x' and without_gradient"):
        dataclasses.replace(rule, needs=frozenset({"grad_x"}))
    with pytest.raises(ValueError, match="needs 'grad_x' and without_gradient"):
        dataclasses.replace(rule, without_gradient="as always")
