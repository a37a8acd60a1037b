"""Training from a notebook: arrays, iterators, streams; warm starts; folders."""

import inspect
import json
from dataclasses import replace
from itertools import chain, islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import (
    SAE,
    Every,
    Knob,
    Member,
    Recipe,
    TrainedSAE,
    init_state,
    make_step,
    train,
    train_many,
)
from sae_jax.activations import Harvester, OnTheFly
from sae_jax.activations.in_memory import Given, InMemory
from sae_jax.fit import CALL, FIELDS, warm
from sae_jax.trained import to_arrays
from tests.conftest import planted
from tests.toys import (
    BATCH,
    BUFFER,
    DOCUMENTS,
    PACKING,
    SITES,
    TOKENS,
    on_the_fly,
    toy_lm,
)

X = 2 * planted(16, 32, 0.1, 512)[0]
Y = np.roll(X, 1, axis=1)[:, :12].copy()
RECIPE = Recipe(steps=6, lr=1e-2, use_aux="never")
ONE_STEP = replace(RECIPE, steps=1)
QUIET = {"every": Every(log=2), "progress": False}


def fit(x=X, rule="topk(k=4)", **options):
    defaults = {"n_features": 32, "recipe": RECIPE, "batch": 64, **QUIET}
    return train(x, rule, **{**defaults, **options})


def batches(n, x=X, batch=64, seed=0):
    return [
        b["x"] for b in islice(InMemory({"x": x}, batch=batch, seed=seed).batches(), n)
    ]


def equal(a: TrainedSAE, b: TrainedSAE) -> bool:
    """To the last bit."""
    left, right = to_arrays(a.variables), to_arrays(b.variables)
    return left.keys() == right.keys() and all(
        left[name].tobytes() == right[name].tobytes() for name in left
    )


# What train() does --------------------------------------------------------------------


def by_hand(xs, sae, recipe=RECIPE, seed=0):
    """The steps one after another, and the metrics of each."""
    state = init_state(sae, recipe.optimiser(), jax.random.key(seed), sample=xs[0])
    step = make_step(sae, recipe.optimiser(), aux=None)
    seen = []
    for x in xs:
        state, metrics = step(state, {"x": x})
        seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen


def test_history_and_arrays_are_those_of_steps_taken_by_hand():
    one = fit(every=Every(log=4), treatment="scale")
    sae = SAE(16, 32, rule="topk(k=4)", treatment="scale")
    assert one.sae == sae
    state, seen = by_hand(batches(6), sae)
    for name, array in one.variables.params.items():
        # Another program, so float32 sums in another order.
        np.testing.assert_allclose(array, state.variables.params[name], atol=2e-5)
    assert [(h["kind"], h["step"], h["rows"]) for h in one.history] == [
        ("train", 4, 4 * 64),
        ("train", 6, 6 * 64),
    ]
    for line, window in zip(one.history, (seen[:4], seen[4:]), strict=True):
        for name in ("loss", "loss_mse", "nmse", "l0", "grad_norm"):
            want = np.mean([metrics[name] for metrics in window])
            np.testing.assert_allclose(line[name], want, rtol=1e-4)
        assert line["dead"] == window[-1]["dead"]
    assert one.about["steps"] == 6
    assert one.about["rows"] == 6 * 64
    assert one.about["recipe"]["lr"] == 1e-2
    assert one.about["site"] == "x"
    json.dumps(one.about, allow_nan=False)


def test_training_helps_and_the_result_can_be_used(tmp_path):
    one = fit(recipe=replace(RECIPE, steps=150), every=Every(log=50))
    losses = [line["loss"] for line in one.history]
    assert losses[0] > losses[1] > losses[2]
    x_hat, codes = one(X.reshape(4, 128, 16))
    error = np.square(np.asarray(x_hat).reshape(-1, 16) - X).mean()
    assert error < 0.4 * X.var()
    assert int((codes != 0).sum(-1).max()) <= 4
    again = sae_jax.load(one.save(tmp_path / "sae"))
    assert equal(one, again)
    assert again.about == one.about


def test_evaluation_is_noted():
    def evaluate(name, sae, variables):
        x_hat = sae.apply(variables, jnp.asarray(X[:8])).x_hat
        return {"error": float(jnp.square(x_hat - X[:8]).mean()), "of": name}

    one = fit(evaluate=evaluate, every=Every(log=6, evaluate=4))
    noted = [h for h in one.history if h["kind"] == "eval"]
    assert [line["step"] for line in noted] == [4, 6]
    assert noted[1]["of"] == "topk"
    want = np.square(np.asarray(one(X[:8])[0]) - X[:8]).mean()
    np.testing.assert_allclose(noted[1]["error"], want, rtol=1e-5)


def test_sixteen_features_for_each_dimension():
    assert fit(n_features=None, recipe=ONE_STEP).sae.n_features == 256


def test_the_knob_is_where_the_schedule_came_to():
    knob = Knob(start=4.0, steps=8)
    one = fit(rule="topk(k=4)", recipe=replace(RECIPE, steps=4, knob=knob))
    assert one.sae.bound.hp["k"] == 10  # 16 to 4 in 8 steps, 4 done


# Where activations come from ----------------------------------------------------------


def test_any_array_is_the_same_as_its_rows():
    want = fit(X)
    assert equal(want, fit(X.reshape(4, 128, 16)))
    assert equal(want, fit(jnp.asarray(X)))
    assert equal(want, fit(X.astype(np.float64)))
    assert equal(want, train_many({"x": X}, solo("x"), RECIPE, batch=64, **QUIET)["a"])
    half = jnp.asarray(X, jnp.bfloat16)
    assert equal(fit(half), fit(np.asarray(half).astype(np.float32)))


def solo(site, **more):
    return {"a": Member(SAE(16, 32, rule="topk(k=4)"), site, **more)}


def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(X).reshape(4, 128, 16)
    assert equal(fit(X), fit(tensor))
    assert equal(fit(X), fit(tensor.clone().requires_grad_()))
    half = jnp.asarray(X, jnp.bfloat16)
    assert equal(fit(half), fit(tensor.bfloat16()))
    each = [torch.from_numpy(np.array(b)) for b in batches(6)]
    assert equal(fit(X), fit(iter(each)))


def test_an_iterator_is_used_in_its_order_and_no_further():
    given = batches(9)
    taken = []

    def generate(given):
        for batch in given:
            taken.append(len(batch))
            yield batch

    assert equal(fit(X), fit(generate(given)))
    assert len(taken) == 6
    assert equal(fit(X), fit(given))  # a list is one as well
    assert equal(fit(X), fit({"x": b} for b in given))
    assert equal(fit(X), fit(b.reshape(8, 8, 16) for b in given))
    assert not equal(fit(X), fit(given[::-1]))


@pytest.mark.parametrize("tail", [(), (X[:10],)])
def test_the_end_of_an_iterator_ends_the_training(tail):
    one = fit(iter([*batches(4), *tail]))
    assert one.about["steps"] == 4
    assert [line["step"] for line in one.history] == [2, 4]
    assert equal(one, fit(X, recipe=replace(RECIPE, steps=4)))


def test_uneven_batches_are_refused():
    first, second = batches(2)
    with pytest.raises(ValueError, match=r"(?s)batch 1 has shapes.*\(10, 16\)"):
        fit([first, second[:10], first])
    with pytest.raises(ValueError, match="batch 1 has shapes"):
        fit([{"x": first}, {"x": first, "y": first}])
    with pytest.raises(ValueError, match="batch 1 has shapes"):
        fit([first, first[:, :5]])


def test_a_stream_of_a_language_model():
    def stream(*sites):
        harvester = Harvester(toy_lm(), sites, contexts_per_pass=4)
        options = {"batch": BATCH, "buffer": BUFFER}
        return OnTheFly(harvester, DOCUMENTS, TOKENS, PACKING, **options)

    one = fit(stream(SITES[0]))
    assert one.about["site"] == SITES[0]
    assert one.about["rows"] == 6 * BATCH
    assert equal(one, fit(b[SITES[0]] for b in stream(SITES[0]).batches()))
    with pytest.raises(ValueError, match="takes one site"):
        fit(on_the_fly())


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": None}, "rule is needed"),
        ({"rule": "tokp"}, "Did you mean 'topk'"),
        ({"rule": "topk(k=99)"}, "k=99 must be above 0 and at most n_features=32"),
        ({"n_features": 0}, "n_features=0; an SAE needs at least one"),
        ({"treatmnet": "scale"}, "option 'treatmnet'. Did you mean 'treatment'"),
        ({"d_out": 4}, "Unknown option 'd_out'"),
        ({"d_in": 4}, "Unknown option 'd_in'"),
        ({"treatment": "no"}, "treatment='no' must be one of"),
        ({"batch": 0}, "batch=0 must be from 1 to the 512 rows"),
        ({"batch": 513}, "batch=513 must be from 1 to the 512 rows"),
        ({"batch": 6.5}, r"batch=6\.5 must be an integer"),
        ({"seed": -1}, "seed=-1 must be finite and not negative"),
        ({"x": X[0]}, "batch=64 must be from 1 to the 1 rows"),
        ({"x": X[:0]}, "no rows"),
        ({"x": np.float32(1)}, r"x is of shape \(\)"),
        ({"x": X.astype(int)}, "holds int"),
        ({"x": np.where(X > 2, np.nan, X)}, "NaN or infinite values in"),
        ({"x": [[1.0, 2.0]]}, "x is a list"),
        ({"x": "runs/shards"}, "x is a str"),
        ({"x": []}, "the iterator of activations gives none"),
        ({"x": 5}, "activations is a int; give an array"),
        ({"x": {}}, "no activations"),
        ({"x": {"a": X, "b": Y}}, "takes one site, given are a, b; see train_many"),
        ({"x": {"a": X, "b": Y[:9]}}, "as many rows each, they have"),
    ],
)
def test_what_cannot_be_used_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        fit(**change)


def test_options_of_train_are_those_of_the_calls_behind_it():
    assert set(FIELDS) <= set(inspect.signature(SAE).parameters)
    assert set(CALL) <= set(inspect.signature(train_many).parameters)


# Seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["batch_topk(k=4)", "variational(k=4)"])
def test_a_seed_repeats_bit_for_bit(rule):
    one, two = fit(rule=rule, seed=5), fit(rule=rule, seed=5)
    assert equal(one, two)
    assert one.history == two.history
    assert not equal(one, fit(rule=rule, seed=6))


def test_a_seed_decides_the_start_and_the_order():
    other = fit(batches(6, seed=0), seed=5)  # the order of seed 0, the start of 5
    assert not equal(other, fit(seed=0))
    assert not equal(other, fit(seed=5))


# Warm starts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start():
    return {rule: fit(rule=rule) for rule in ("topk(k=4)", "batch_topk(k=4)")}


def test_the_same_rule_goes_on(start):
    before = start["topk(k=4)"]
    kept = to_arrays(before.variables)
    one = fit(rule=None, n_features=None, start=before, every=Every(log=1))
    [x] = batches(1)
    want = np.square(np.asarray(before(x)[0]) - x).mean()
    # Relative; the same in another program.
    np.testing.assert_allclose(one.history[0]["loss_mse"], want, rtol=1e-5)
    assert one.history[0]["loss_mse"] < 0.9 * fit(every=Every(log=1)).history[0]["loss"]
    assert one.sae == before.sae
    now = to_arrays(before.variables)  # training has left the start alone
    assert all((kept[name] == now[name]).all() for name in kept)


def test_the_same_rule_keeps_its_memory(start):
    before = start["batch_topk(k=4)"]
    sae = SAE(16, 32, rule="batch_topk(k=6)")
    assert any(float(value) for value in before.variables.state.values())
    taken = warm(sae, before, 0)
    assert equal(TrainedSAE(sae, taken), before)


@pytest.mark.parametrize("rule", ["gated", "jump_relu", "group_bias", "toy_tied"])
def test_another_rule_takes_the_four_arrays_alone(rule, start):
    before = start["batch_topk(k=4)"]
    sae = SAE(16, 32, rule=rule)
    taken, fresh = warm(sae, before, 3), sae.init(jax.random.key(3))
    assert taken.params.keys() == fresh.params.keys()
    assert taken.state.keys() == fresh.state.keys()
    four = {"W_enc", "b_enc", "W_dec", "b_dec"} & taken.params.keys()
    for name in four:
        assert (taken.params[name] == before.variables.params[name]).all()
    for name in taken.params.keys() - four:
        assert (taken.params[name] == fresh.params[name]).all()
    for name, value in taken.state.items():
        assert (value == fresh.state[name]).all()
    one = fit(rule=rule, start=before, recipe=ONE_STEP)
    assert one.sae == sae


@pytest.mark.parametrize(
    ("first", "then", "kept"),
    [
        # The same codes in training, so the same threshold after it.
        ("batch_topk(k=4)", "matryoshka(k=4)", {"threshold_sum", "threshold_weight"}),
        # From one threshold to one for each feature.
        ("mutual_choice(k=4)", "feature_choice(k=4)", {"firings"}),
        ("feature_choice(k=4)", "mutual_choice(k=4)", {"firings"}),
        ("mutual_choice(k=4)", "batch_topk", {"threshold_sum", "threshold_weight"}),
    ],
)
def test_memory_of_the_same_name_and_shape_is_taken_over(first, then, kept, start):
    before = start[first] if first in start else fit(rule=first)
    sae = SAE(16, 32, rule=then)
    taken, fresh = warm(sae, before, 0).state, sae.init(jax.random.key(0)).state
    assert taken.keys() == fresh.keys()
    for name, value in taken.items():
        old = before.variables.state[name] if name in kept else fresh[name]
        np.testing.assert_array_equal(value, old)
        assert bool(value.any()) == (name in kept)


def test_a_tied_encoder_is_taken_from_the_decoder():
    before = fit(rule="toy_tied")
    taken = warm(SAE(16, 32, rule="relu"), before, 0).params
    assert (taken["W_enc"] == before.variables.params["W_dec"]).all()


def test_a_scale_is_taken_over_and_none_is_made_up():
    before = fit(treatment="scale", recipe=ONE_STEP)
    one = fit(rule="relu", start=before, recipe=ONE_STEP)
    assert one.sae.treatment == "scale"
    scale = before.variables.constants["scale_in"]
    assert one.variables.constants["scale_in"] == scale != 1
    for old, new in (("none", "scale"), ("scale", "none")):
        before = fit(treatment=old, recipe=ONE_STEP)
        with pytest.raises(ValueError, match=f"treatment='{old}', not '{new}'"):
            fit(start=before, treatment=new)


def test_other_sizes_cannot_be_started_from(start):
    before = start["topk(k=4)"]
    for rule in ("topk(k=4)", "relu"):
        with pytest.raises(
            ValueError, match=r"W_\w+'?\] of shape \(.*leave n_features"
        ):
            fit(rule=rule, start=before, n_features=48)
    with pytest.raises(ValueError, match="x is 12 wide, the SAE is made for 16"):
        fit(Y, rule=None, n_features=None, start=before)


# Folders ------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop(name, sae, variables):
    raise Stopped


SAVING = Every(log=2, save=2, evaluate=4)


def noted(name, sae, variables):
    return {"bias": float(variables.params["b_dec"].sum())}


def test_a_folder_is_gone_on_with_bit_for_bit(tmp_path):
    folder, options = tmp_path / "run", {"every": SAVING, "rule": "batch_topk(k=4)"}
    whole = fit(folder=tmp_path / "whole", evaluate=noted, **options)
    with pytest.raises(Stopped):
        fit(folder=folder, evaluate=stop, **options)  # two steps are safe, or four
    one = fit(folder=folder, evaluate=noted, **options)
    assert equal(one, whole)
    assert equal(one, fit(evaluate=noted, **options))
    assert equal(one, sae_jax.load(folder / "saes" / "batch_topk"))
    metrics = [(f / "metrics.jsonl").read_bytes() for f in (folder, tmp_path / "whole")]
    assert metrics[0] == metrics[1]
    again = fit(folder=folder, evaluate=noted, **options)  # nothing is left to do
    assert equal(one, again)
    assert (folder / "metrics.jsonl").read_bytes() == metrics[0]


def test_a_folder_is_refused_to_other_settings_and_other_arrays(tmp_path):
    options = {"folder": tmp_path / "run", "every": SAVING}
    with pytest.raises(Stopped):
        fit(evaluate=stop, **options)
    changes = {
        "recipe.lr": {"recipe": replace(RECIPE, lr=2e-2)},
        r"sae\.rule was 'topk\(k=4\)'": {"rule": "topk(k=5)"},
        "seed was 0 and is 1": {"seed": 1},
        "batch was 64 and is 32": {"batch": 32},
        "start was None and is": {"start": fit()},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=f"(?s)other settings.*{message}"):
            fit(**options, **change)
    with pytest.raises(ValueError, match="position belongs to other arrays"):
        fit(X[::-1], **options)
    assert equal(fit(**options), fit())


def test_an_iterator_cannot_go_on_from_a_folder(tmp_path):
    options = {"folder": tmp_path / "run", "every": SAVING}
    one = fit(iter(batches(4)), **options)
    assert one.about["steps"] == 4
    with pytest.raises(ValueError, match="an iterator cannot go back or on to batch 4"):
        fit(iter(batches(4)), **options)


# Several at once ----------------------------------------------------------------------

ARRAYS = {"a": X, "b": Y}


def many(members, **options):
    return train_many(ARRAYS, members, RECIPE, **{"batch": 64, **QUIET, **options})


def test_several_are_what_each_is_alone():
    members = {
        "topk": Member(SAE(16, 32, rule="topk(k=4)"), "a"),
        "twin": Member(SAE(16, 32, rule="topk(k=4)"), "a", seed=1),
        "narrow": Member(SAE(12, 48, rule="batch_topk(k=3)"), "b"),
        "across": Member(SAE(16, 32, rule="relu", d_out=12), "a", "b"),
        "drawn": Member(
            SAE(12, 32, "variational(k=3)", treatment="scale"), "b", seed=2
        ),
    }
    together = many(members)
    assert list(together) == list(members)
    for name, member in members.items():
        alone = many({name: member})[name]
        assert equal(together[name], alone), name
        assert together[name].history == alone.history
        assert together[name].about == alone.about
    assert not equal(together["topk"], together["twin"])
    assert equal(together["topk"], fit(X))


def test_a_transcoder_aims_at_its_target():
    sae = SAE(16, 32, rule="topk(k=4)", d_out=12)
    member = Member(sae, "a", target="b")
    one = many({"t": member}, every=Every(log=1))["t"]
    assert one.about["target"] == "b"
    assert one(X)[0].shape == (512, 12)
    key, _ = jax.random.split(jax.random.key(0))
    first = next(InMemory(ARRAYS, batch=64).batches())
    x_hat = sae.apply(sae.init(key), first["a"]).x_hat
    want = np.square(np.asarray(x_hat - first["b"])).mean()
    np.testing.assert_allclose(one.history[0]["loss_mse"], want, rtol=1e-5)


def test_members_that_do_not_fit_are_named_together():
    plain, across = SAE(16, 32, rule="relu"), SAE(16, 32, rule="relu", d_out=12)
    members = {
        "p": Member(plain, "c"),
        "q": Member(plain, "b"),
        "r": Member(plain, "a", target="b"),
        "s": Member(across, "a"),
        "t": Member(across, "a", target="a"),
    }
    with pytest.raises(ValueError, match="p: no site 'c'; there are a, b") as caught:
        many(members)
    lines = str(caught.value).splitlines()
    assert "q: b is 12 wide, the SAE is made for 16." in lines
    assert "t: a is 16 wide, the SAE is made for 12." in lines
    for name in "rs":
        fault = f"{name}: a transcoder, and only a transcoder, has a target site."
        assert fault in lines


# Batches of arrays --------------------------------------------------------------------


def numbers(n, batch, seed=0, start=0):
    """Which rows of 23 the batches hold."""
    arrays = {"n": np.arange(23.0)[:, None], "m": -np.arange(23.0)[:, None]}
    stream = InMemory(arrays, batch=batch, seed=seed)
    found = list(islice(stream.batches(start), n))
    assert all((batch["n"] == -batch["m"]).all() for batch in found)
    return [batch["n"][:, 0].astype(int).tolist() for batch in found]


@pytest.mark.parametrize("batch", [1, 5, 23])
def test_each_row_once_in_each_epoch(batch):
    order = list(chain(*numbers(-(-3 * 23 // batch), batch)))
    epochs = [order[i * 23 : (i + 1) * 23] for i in range(3)]
    assert [sorted(epoch) for epoch in epochs] == 3 * [list(range(23))]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])
    assert list(chain(*numbers(3, 5, seed=1))) != order[:15]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13, 100])
def test_batches_go_on_at_any_number(start):
    assert numbers(3, 5, start=start) == numbers(start + 3, 5)[start:]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_batches_are_float32(dtype):
    x = X.astype(jnp.dtype(dtype))
    for stream in (InMemory({"x": x}, batch=8), Given([x[:8]], "x")):
        batch = next(stream.batches())["x"]
        assert isinstance(batch, jax.Array)
        assert batch.dtype == jnp.float32


def test_the_position_of_other_arrays_is_refused():
    stream = InMemory(ARRAYS, batch=8, seed=1)
    position = json.loads(json.dumps(stream.position(3)))
    want = list(islice(stream.batches(), 4))[3]
    found = next(InMemory(ARRAYS, batch=8, seed=1).batches(3, position))
    assert all((want[site] == found[site]).all() for site in ARRAYS)
    others = {
        "rows": InMemory({"a": X[:500], "b": Y[:500]}, batch=8, seed=1),
        "values": InMemory({"a": X + 1, "b": Y}, batch=8, seed=1),
        "sites": InMemory({"a": X, "c": Y}, batch=8, seed=1),
        "seed": InMemory(ARRAYS, batch=8, seed=2),
        "batch": InMemory(ARRAYS, batch=4, seed=1),
    }
    for other in others.values():
        with pytest.raises(ValueError, match="position belongs to other arrays"):
            next(other.batches(3, position))


def test_an_iterator_is_used_once():
    stream = Given([X[:8], X[8:16]], "x")
    assert stream.widths == {"x": 16}
    assert stream.batch == 8
    assert stream.position(1) is None
    with pytest.raises(ValueError, match="an iterator cannot go back or on to batch 1"):
        next(stream.batches(1))
    assert len(list(stream.batches())) == 2
    with pytest.raises(ValueError, match="an iterator cannot go back or on to batch 0"):
        next(stream.batches())


# Recipes ------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users")
def test_faults_of_a_recipe_are_told_together():
    with pytest.raises(ValueError, match="steps") as caught:
        Recipe(steps=1.5, lr=-1.0, decay="exponential", clip="no", decoder_norm="up")
    lines = str(caught.value).splitlines()
    names = ["steps", "lr", "decay", "clip", "decoder_norm"]
    assert [line.split("=")[0] for line in lines] == names
    for change, message in (
        ({"steps": 0}, "steps=0 trains nothing"),
        ({"steps": 5, "warmup": 6}, "warmup=6 is longer than steps=5"),
        ({"use_aux": "sometimes"}, "use_aux='sometimes' must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**change)


@pytest.mark.parametrize(
    ("asked", "rates"),
    [
        ({}, [0.12] * 8),
        ({"warmup": 4}, [0, 0.03, 0.06, 0.09, 0.12, 0.12, 0.12, 0.12]),
        ({"decay": "linear"}, [0.12, 0.105, 0.09, 0.075, 0.06, 0.045, 0.03, 0.015]),
        (
            {"warmup": 4, "decay": "linear"},
            [0, 0.03, 0.06, 0.09, 0.12, 0.09, 0.06, 0.03],
        ),
        (
            {"decay": "cosine"},
            [0.06 * (1 + np.cos(np.pi * t / 8)) for t in range(8)],
        ),
    ],
)
def test_learning_rate_is_as_asked(asked, rates):
    """Under a gradient that stays the same, Adam's step is the learning rate."""
    optimiser = Recipe(steps=8, lr=0.12, **asked).optimiser()
    params, grad = {"w": jnp.zeros(2)}, {"w": jnp.array([0.3, -0.3])}
    state = optimiser.init(params)
    for rate in rates:
        updates, state = optimiser.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        # float32, and the 1e-8 in Adam's denominator.
        np.testing.assert_allclose(updates["w"], [-rate, rate], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("use", "rule", "aux"),
    [
        ("rule", "topk(k=4)", True),
        ("rule", "relu", False),
        ("always", "relu", True),
        ("never", "topk(k=4)", False),
    ],
)
def test_the_auxiliary_loss_is_there_where_it_is_asked_for(use, rule, aux):
    one = fit(rule=rule, recipe=Recipe(steps=1, use_aux=use))
    assert ("loss_aux" in one.history[0]) == aux
