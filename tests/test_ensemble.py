"""SAEs trained side by side: each as if it were alone, whatever becomes of others."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import RULES, SAE, AuxK, Every, Knob, Member, Recipe, adam, init_state
from sae_jax.activations.in_memory import InMemory
from sae_jax.binding import bind
from sae_jax.run.checkpoints import Checkpoints
from sae_jax.run.devices import OneDevice
from sae_jax.run.diverged import NotFinite
from sae_jax.run.groups import grouped
from sae_jax.run.log import JsonLines
from sae_jax.run.loop import Loop
from sae_jax.training.ensemble import Ensemble
from sae_jax.training.optim import learning_rate
from sae_jax.training.window import empty
from tests import contract
from tests.contract import close

B, D, F = 16, 8, 64
RATES = (1e-2, None, 3e-3, 2e-2)


class Steady(Recipe):
    """With the usual 1e-8, gradients that cancel to rounding errors move parameters."""

    def optimiser(self, lr=None):
        lr = self.lr if lr is None else lr
        return adam(learning_rate(lr, self.steps, warmup=self.warmup), eps=1e-3)


RECIPE = Steady(steps=100, lr=5e-3, warmup=2, aux=AuxK(dead_after=2, k=16))
MOVING = Knob(start=1.5, steps=3, target_l0=4.0)
TURNING = dataclasses.replace(RECIPE, accumulate=2, knob=MOVING)


def turned(name, factor):
    """The rule's example with another knob, where that may be traced."""
    rule = RULES[name]
    hp = dict(bind(rule, rule.example).hp)
    if rule.knob in rule.traced:
        hp[rule.knob] = type(hp[rule.knob])(hp[rule.knob] * factor)
    return bind(rule, hp)


def batch(i):
    x = contract.rows(30 + i, B, D)
    return {"x": x, "grad": contract.gradient_of_model(x), "mask": jnp.arange(B) != i}


def trained(ensemble, seeds, steps=5):
    """State and window of each after some steps."""
    starts = []
    for sae, seed in zip(ensemble.saes, seeds, strict=True):
        recipe = ensemble.recipe
        state = init_state(sae, recipe.optimiser(), jax.random.key(seed))
        step = recipe.make_step(sae, jit=False)
        starts.append((state, empty(step, state, batch(0))))
    own, (state, window) = ensemble.own(), ensemble.stacked(starts)
    program = jax.jit(ensemble.make_step())
    for i in range(steps):
        state, window = program(own, state, window, batch(i))
    held = jax.device_get((state.replace(key=jax.random.key_data(state.key)), window))
    return [ensemble.of(held, i) for i in range(len(starts))]


def same(found, expected):
    (state, window), (other, others) = found, expected
    jax.tree.map(lambda a, b: close(a, b, 1e-4), state, other)
    assert window.values.keys() == others.values.keys()
    for name, value in window.values.items():
        np.testing.assert_allclose(value, others.values[name], 1e-4, 1e-5, err_msg=name)


@pytest.mark.parametrize("name", list(RULES))
def test_each_is_as_if_it_were_alone(name):
    """By vmap, with seeds, rates and knobs of their own."""
    saes = tuple(SAE(D, F, rule=turned(name, factor)) for factor in (2, 1))
    other, found = trained(Ensemble(saes, RECIPE, RATES[:2], at_once=2), [0, 1])
    [expected] = trained(Ensemble(saes[1:], RECIPE, RATES[1:2]), [1])
    same(found, expected)
    with pytest.raises(AssertionError):
        same(other, expected)


def test_however_many_at_once_in_pieces_and_with_knobs_that_move():
    saes = tuple(SAE(D, F, rule=f"topk(k={k})") for k in (2, 3, 4, 6))
    alone = [
        trained(Ensemble(saes[i : i + 1], TURNING, RATES[i : i + 1]), [i])[0]
        for i in range(4)
    ]
    for at_once in (1, 2, 4):
        together = trained(Ensemble(saes, TURNING, RATES, at_once), range(4))
        for found, expected in zip(together, alone, strict=True):
            same(found, expected)
            assert "knob" in found[1].values


def test_what_no_member_calls_for_is_not_computed():
    """Else each step would take both ways, of the loss of dead features above all."""
    ensemble = Ensemble((SAE(D, F, "topk(k=4)"),) * 3, RECIPE, (None,) * 3, 3)
    starts = [
        init_state(sae, RECIPE.optimiser(), jax.random.key(0)) for sae in ensemble.saes
    ]
    state = ensemble.stacked(starts)
    step = RECIPE.make_step(ensemble.sae, jit=False)
    window = ensemble.stacked([empty(step, starts[0], batch(0))] * 3)
    of_all, own = ensemble.make_step(), ensemble.own()
    # The update alone: one that has diverged takes none, and the others theirs.
    programs = (
        jax.make_jaxpr(step)(starts[0], batch(0)),
        jax.make_jaxpr(of_all)(own, state, window, batch(0)),
    )
    alone, together = (list(steps_in(program.jaxpr)) for program in programs)
    names = [[eqn.primitive.name for eqn in found] for found in (alone, together)]
    assert [found.count("cond") for found in names] == [1, 0]
    loops = [eqn for eqn in together if eqn.primitive.name == "while"]
    assert len(loops) == 2, "one with few dead features, one with many"
    for loop in loops:
        i, n, loss = (v.aval.shape for v in loop.outvars[:3])
        assert (i, n, loss) == ((), (), (3,)), "the number of turns is that of all"


def steps_in(jaxpr):
    """All equations of a program, those of its parts included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            part = getattr(value, "jaxpr", value)
            if hasattr(part, "eqns"):
                yield from steps_in(part)


# Who is trained with whom


def names(members, recipe=RECIPE):
    return [group.names for group in grouped(members, recipe)]


def test_who_is_alike_is_trained_together():
    def member(rule, site="a", width=D, **fields):
        return Member(SAE(width, F, rule=rule), site, **fields)

    members = {
        "one": member("relu(coef=0.1)"),
        "seed": member("relu(coef=0.1)", seed=3),
        "coefficient": member("relu(coef=0.9)"),
        "rate": member("relu(coef=0.1)", lr=1.0),
        "other site": member("relu(coef=0.1)", site="b"),
        "other rule": member("jump_relu(coef=0.1)"),
        "other width": member("relu(coef=0.1)", width=D + 1),
        "other argument": member("jump_relu(coef=0.1, bandwidth=0.5)"),
        "k": member("topk(k=4)"),
    }
    assert names(members) == [
        ("one", "seed", "coefficient", "rate"),
        *((name,) for name in list(members)[4:]),
    ]


def test_budgets_that_are_near_are_trained_together():
    members = {
        f"{k}": Member(SAE(D, F, f"topk(k={k})"), "a") for k in (9, 8, 3, 4, 16, 6)
    }
    assert names(members) == [("3", "4", "6"), ("8", "9", "16")]


@pytest.mark.parametrize(
    ("most", "n", "features", "found"),
    [(0, 6, 64, 1), (4, 6, 64, 3), (6, 6, 64, 6), (9, 5, 64, 5), (1, 5, 64, 1)],
)
def test_as_many_are_computed_at_once_as_was_asked_for(most, n, features, found):
    assert OneDevice(most).at_once(n, features) == found


def test_elsewhere_than_on_a_cpu_small_ones_are_computed_at_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert OneDevice().at_once(6, 2048) == 6
    assert OneDevice().at_once(6, 2**15) == 3
    assert OneDevice().at_once(6, 2**20) == 1


def test_one_program_serves_all_sites():
    members = {
        f"{site} {seed}": Member(SAE(D, F, "topk(k=4)"), site, seed=seed, lr=0.1 * seed)
        for site in "ab"
        for seed in (1, 2)
    }
    groups = grouped(members, RECIPE)
    rows = {site: contract.rows(1, B, D) for site in "ab"}
    steps = groups.compile(groups.fresh(rows), rows)
    assert len(groups) == 2
    assert steps[0] is steps[1]


# One that diverges

DATA = {"x": np.asarray(contract.rows(0, 160, D))}
HOT = {
    "cold": Member(SAE(D, F, "relu(coef=0.01)"), "x"),
    "hot": Member(SAE(D, F, "relu(coef=0.01)"), "x", seed=1, lr=1e30),
    "warm": Member(SAE(D, F, "relu(coef=0.01)"), "x", seed=2, lr=1e-2),
}
PLAIN = Recipe(steps=12, lr=1e-3)


def loop(members, folder=None, recipe=PLAIN, steps=None):
    recipe = recipe if steps is None else dataclasses.replace(recipe, steps=steps)
    saved = None if folder is None else Checkpoints(folder / "checkpoints")
    return Loop(
        members,
        InMemory(DATA, batch=B),
        recipe,
        every=Every(log=3, save=4),
        logs=lambda start: (
            [JsonLines(folder / "metrics.jsonl", start)] if folder else []
        ),
        checkpoints=saved,
        progress=False,
    )


def test_one_that_diverges_disturbs_no_other(capsys):
    found = loop(HOT).run()
    assert capsys.readouterr().err.count("hot: the loss or its gradient was not") == 1
    step = found["hot"].about["diverged_in_step"]
    assert 0 < step < 4
    for name in ("cold", "warm"):
        assert "diverged_in_step" not in found[name].about
        alone = loop({name: HOT[name]}).run()[name]
        for a, b in zip(
            *map(jax.tree.leaves, (found[name].variables, alone.variables)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    # It stays as it was before that step.
    before = loop({"hot": HOT["hot"]}, steps=step).run()["hot"]
    jax.tree.map(
        np.testing.assert_array_equal, found["hot"].variables, before.variables
    )
    kinds = [line["kind"] for line in found["hot"].history]
    assert kinds == ["diverged"] or kinds == ["train", "diverged"]


def test_when_all_have_diverged_training_ends(tmp_path):
    members = {"hot": HOT["hot"], "hotter": HOT["hot"]._replace(lr=1e34)}
    with pytest.raises(NotFinite, match=r"^hot.*was not finite in step [0-3], .*Lower"):
        loop(members, tmp_path).run()


@pytest.mark.parametrize("stopped", range(1, 12))
def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, stopped, monkeypatch):
    """With a member that has diverged; the same bytes are left as without a stop."""
    left = {}
    for kind in ("whole", "stopped"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "stopped":
            first = loop(HOT, folder)
            real, taken = Loop._duties, []

            def duties(self, t, last, real=real, taken=taken):
                if t == stopped:
                    taken.append(self._save_now())
                    raise KeyboardInterrupt
                return real(self, t, last)

            with monkeypatch.context() as patched:
                patched.setattr(Loop, "_duties", duties)
                with pytest.raises(KeyboardInterrupt):
                    first.run()
            assert f"{stopped} steps are safe" in taken[0]
            first.checkpoints.close()
        one = loop(HOT, folder)
        found = one.run()
        one.checkpoints.close()
        left[kind] = found, (folder / "metrics.jsonl").read_bytes()
    assert left["whole"][1] == left["stopped"][1]
    lines = [json.loads(line) for line in left["whole"][1].splitlines()]
    assert [line["sae"] for line in lines if line["kind"] == "diverged"] == ["hot"]
    jax.tree.map(
        np.testing.assert_array_equal,
        *({n: one.variables for n, one in left[kind][0].items()} for kind in left),
    )
