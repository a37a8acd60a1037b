"""Settings: from a dataclass to flags, from text to values, and every fault at once."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Optional

import pytest

import sae_jax
from sae_jax import settings
from sae_jax.settings import Spec


@dataclass(frozen=True)
class Decay:
    """How the learning rate falls."""

    steps: Annotated[int, "over how many steps"] = 20


@dataclass(frozen=True)
class Training:
    """How it is trained.

    A second line, which no heading shows.
    """

    steps: Annotated[int, "steps in all"] = 100
    lr: Annotated[float, "learning rate"] = 1e-3
    clip: Annotated[float | None, "largest norm of a gradient"] = None
    decay: Decay = Decay()

    def __post_init__(self) -> None:
        faults = []
        if self.steps < 1:
            faults.append(f"steps={self.steps} must be at least 1")
        if self.decay.steps > self.steps:
            faults.append(f"decay.steps={self.decay.steps} is more than steps")
        if self.lr == 13:
            faults.append("an unlucky number")
        if faults:
            raise ValueError("\n".join(faults))


@dataclass
class Scores:
    """What is measured."""

    every: Annotated[int, "steps between measurements"] = 10
    lr: Annotated[float, "another of that name"] = 1.0


@dataclass
class Base:
    out: Annotated[str, "folder to write to"] = "runs/base"
    kind: Annotated[Literal["flax", "torch", 3], "what runs it"] = "flax"


@dataclass
class Config(Base):
    """What can be set."""

    rule: Annotated[Spec, "the rule"] = "top_afa(coef=0.03125)"
    rules: Annotated[tuple[Spec, ...], "all the rules"] = ("topk",)
    train: Training = Training(steps=600)
    rule_files: Annotated[tuple[str, ...], "files with rules"] = ()
    seeds: Annotated[tuple[int, ...], "one run each"] = (0, 1)
    rates: Annotated[tuple[float, ...], "to sweep"] = (0.5,)
    rows: Annotated[int | None, "how many"] = None
    name: Annotated[Optional[str], "of the run"] = "a b"  # noqa: UP045
    join: Annotated[bool, "whether"] = True
    scores: Scores = field(default_factory=Scores)
    out: str = "runs/config"

    def faults(self) -> Iterator[str]:
        if self.scores.every > self.train.steps:
            yield f"scores.every={self.scores.every} is more than {self.train.steps}"
        if self.out == "":
            yield "out must be given"
        if len(self.seeds) > 3:
            yield "so many seeds take a week"


def build(**given: str) -> tuple[Any, list[str]]:
    """With two underscores for a dot."""
    return settings.build(
        Config(), {flag.replace("__", "."): text for flag, text in given.items()}
    )


def test_every_leaf_is_a_setting_sections_last():
    found = {s.flag: s for s in settings.declared(Config())}
    assert list(found) == [
        *"out kind rule rules rule_files seeds rates rows name join".split(),
        *"config.train.steps config.train.lr config.train.clip".split(),
        *"config.train.decay.steps config.scores.every config.scores.lr".split(),
    ]
    steps = found["config.train.steps"]
    assert steps == (
        "config.train.steps",
        ("train", "steps"),
        int,
        600,
        "steps in all",
        "How it is trained.",
    )
    assert found["config.train.decay.steps"].heading == "How the learning rate falls."
    assert found["rows"].heading == "What can be set."


def test_a_subclass_that_changes_a_default_keeps_type_and_description():
    out = settings.declared(Config())[0]
    assert (out.text, out.value, out.kind) == (
        "folder to write to",
        "runs/config",
        str,
    )


NESTED = "matryoshka(k=8,prefixes=[1.0])"
QUOTED = "jump_relu(coef=1.0,variant='paper')"
GOOD = [
    ("", str, ""),
    ("a, b", str, "a, b"),
    ("12", int, 12),
    ("-3", int, -3),
    ("1_000_000", int, 1_000_000),
    ("1e6", int, 1_000_000),
    ("2.50e1", int, 25),
    ("12345678901234567891", int, 12345678901234567891),
    ("1e-3", float, 1e-3),
    ("1/32", float, 0.03125),
    ("-1/4", float, -0.25),
    ("3", float, 3.0),
    ("true", bool, True),
    ("False", bool, False),
    ("1", bool, True),
    ("0", bool, False),
    ("torch", Literal["flax", "torch", 3], "torch"),
    ("3", Literal["flax", "torch", 3], 3),
    ("", tuple[str, ...], ()),
    ("a, b ,c", tuple[str, ...], ("a", "b", "c")),
    (",a,,b,", tuple[str, ...], ("a", "b")),
    ("matryoshka(k=8,prefixes=[1.0])", tuple[Spec, ...], (NESTED,)),
    ("jump_relu(coef=1.0,variant='paper'),", tuple[Spec, ...], (QUOTED,)),
    ("0,1e3", tuple[int, ...], (0, 1000)),
    ("1/2,1", tuple[float, ...], (0.5, 1.0)),
    ("none", int | None, None),
    ("None", Optional[str], None),  # noqa: UP045
    ("7", int | None, 7),
    ("1/8", float | None, 0.125),
    ("topk", Spec, "topk"),
    ("topk(k=32)", Spec, "topk(k=32)"),
    (
        "topk(k=32), matryoshka(k=8,prefixes=[0.5,1.0]),relu",
        tuple[Spec, ...],
        ("topk(k=32)", "matryoshka(k=8,prefixes=[0.5,1.0])", "relu"),
    ),
]


@pytest.mark.parametrize(("text", "kind", "value"), GOOD)
def test_text_is_read_as_its_type_says_and_shown_so_that_it_is_read_again(
    text, kind, value
):
    read = settings.parse(text, kind)
    assert read == value
    assert type(read) is type(value)
    (again,) = shlex.split(settings.show(read))
    assert settings.parse(again, kind) == value


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("many", int, "'many' is not an integer"),
        ("0.5", int, "'0.5' is not an integer"),
        ("1e-3", int, "'1e-3' is not an integer"),
        ("1/2", int, "'1/2' is not an integer"),
        ("1e23", int, "'1e23' is not an integer"),  # no float is that number
        ("inf", int, "'inf' is not an integer"),
        ("", int, "'' is not an integer"),
        ("x", float, "'x' is not a number"),
        ("nan", float, "'nan' is not a number"),
        ("1e999", float, "'1e999' is not a number"),
        ("1/0", float, "'1/0' is not a number"),
        ("1/2/3", float, "'1/2/3' is not a number"),
        ("yes", bool, "'yes' is not true or false"),
        ("tf", Literal["flax", "torch"], "'tf' is not one of flax, torch"),
        ("1,x,2", tuple[int, ...], "'x' is not an integer"),
        ("1,x,y", tuple[int, ...], "'x' is not an integer\n'y' is not an integer"),
        ("1.0", int, "'1.0' is not an integer"),
        ("x", int | None, "'x' is not an integer, or none"),
        ("topkk(k=3)", Spec, "Unknown rule 'topkk'. Did you mean 'topk'?"),
        ("topk(k=3", Spec, "Cannot read 'topk(k=3'"),
        ("topk(k=3),topk(kk=1)", tuple[Spec, ...], "Unknown argument 'kk'"),
    ],
)
def test_text_that_stands_for_no_value_is_refused(text, kind, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        settings.parse(text, kind)
    assert message in str(refused.value)


@pytest.mark.parametrize("kind", [dict[str, int], int | str, tuple[int, int], bytes])
def test_a_type_that_no_text_can_give_is_refused_where_it_is_declared(kind):
    @dataclass
    class Odd:
        odd: Annotated[kind, "odd"] = None

    with pytest.raises(TypeError, match="cannot be a setting"):
        settings.declared(Odd())


def test_a_field_without_description_is_refused():
    @dataclass
    class Bare:
        bare: int = 3

    with pytest.raises(TypeError, match="Describe bare"):
        settings.declared(Bare())


def test_values_reach_their_sections_and_the_rest_keeps_its_defaults():
    config, faults = build(
        out="x y",
        rows="1e3",
        join="false",
        config__train__lr="3e-4",
        config__train__decay__steps="5",
        config__scores__every="2",
    )
    assert faults == []
    assert config == Config(
        out="x y",
        rows=1000,
        join=False,
        train=Training(steps=600, lr=3e-4, decay=Decay(5)),
        scores=Scores(every=2),
    )
    assert build()[0] == Config()


def test_all_faults_come_at_once_each_with_its_flag():
    config, faults = build(
        ruel="relu",
        seeds="0,one,2",
        kind="jax",
        rule="topk(kk=3)",
        rules="relu,topk(k=-1)",
        config__train__lr="fast",
        config__train__steps="0",
        config__scores__every="500",
        out="",
    )
    assert [fault.split(" ")[0] for fault in faults] == [
        "--ruel:",
        "--kind:",
        "--rule:",
        "--rules:",
        "--seeds:",
        "--config.train.lr:",
        "--config.train.steps=0",
        "--config.train.decay.steps=20",
        "--out",
    ]
    assert faults[-1] == "--out must be given"
    # Where a value is not usable, the default stands in: 500 is less than 600 steps.
    assert config == replace(Config(), out="", scores=Scores(every=500))
    assert faults[6] == "--config.train.steps=0 must be at least 1"


def test_what_names_no_setting_is_said_of_its_section():
    assert build(config__train__lr="13")[1] == ["--config.train: an unlucky number"]
    assert build(seeds="1,2,3,4")[1] == ["so many seeds take a week"]
    assert build(config__scores__every="601")[1] == [
        "--config.scores.every=601 is more than 600"
    ]


def test_a_configuration_that_refuses_itself_as_a_whole_is_a_fault():
    @dataclass
    class Whole:
        """All."""

        rows: Annotated[int, "how many"] = 1

        def __post_init__(self):
            if self.rows == 2:
                raise ValueError("rows=2 is taken")

    assert settings.build(Whole(), {"rows": "2"}) == (
        Whole(),
        ["--rows=2 is taken"],
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ruel", "--rule"),
        ("ruless", "--rules"),
        ("dryrun", "--dry_run"),
        ("train.lr", "--config.train.lr"),
        ("trian.lr", "--config.train.lr"),
        ("config.train.lrr", "--config.train.lr"),
        ("clip", "--config.train.clip"),
        ("clipp", "--config.train.clip"),
        ("train.out", "--out"),
        ("config.every", "--config.scores.every"),
        ("optimiser.clip", "--config.train.clip"),
        ("lr", "--config.train.lr or --config.scores.lr"),
    ],
)
def test_a_misspelt_flag_gets_its_near_miss(given, meant):
    _, faults = settings.build(Config(), {given: "1"}, also=["dry_run"])
    assert faults == [f"--{given}: there is no such setting. Did you mean {meant}?"]


def test_a_flag_that_is_near_nothing_is_sent_to_the_manual():
    assert build(zzzzqqq="")[1] == ["--zzzzqqq: there is no such setting. See --help."]


def test_rule_files_are_loaded_before_specs_are_read(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from sae_jax import Rule, from_pre, register\n"
        "def mine_too(pre, *, k: int = 1): return pre\n"
        "register(Rule('mine_too', 'none', 'x', from_pre(mine_too), {}, 'k'))\n"
    )
    try:
        config, faults = build(rule="mine_too(k=2)", rule_files=str(file))
        assert faults == []
        assert config.rule == "mine_too(k=2)"
    finally:
        sae_jax.RULES._items.pop("mine_too", None)


def test_rule_files_that_cannot_be_loaded_are_faults(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    absent = tmp_path / "absent.py"
    _, faults = build(rule_files=f"{broken},{absent}", rows="x")
    assert faults == [
        f"--rule_files={broken}: ZeroDivisionError: division by zero",
        f"--rule_files={absent}: There is no file {absent}; give a Python file with a "
        "rule.",
        "--rows: 'x' is not an integer, or none",
    ]


def test_a_configuration_survives_json():
    config = Config(
        rows=7, rates=(1 / 3, 1e-300), train=Training(clip=0.1, decay=Decay(1))
    )
    stored = settings.to_dict(config)
    assert stored["train"] == {
        "steps": 100,
        "lr": 1e-3,
        "clip": 0.1,
        "decay": {"steps": 1},
    }
    assert stored["seeds"] == [0, 1]
    again = settings.from_dict(Config, json.loads(json.dumps(stored)))
    assert again == config
    assert again.seeds == (0, 1)


def test_a_stored_configuration_may_be_partial_but_not_unknown():
    assert settings.from_dict(Config, {"train": {"lr": 0.5}}) == Config(
        train=Training(steps=600, lr=0.5)
    )
    with pytest.raises(ValueError, match="steps=0 must be") as refused:
        settings.from_dict(
            Config, {"rowz": 1, "train": {"steps": 0, "decay": {"stepz": 1}}}
        )
    assert "'rowz'. Did you mean 'rows'?" in str(refused.value)
    assert "'train.decay.stepz'. Did you mean 'train.decay.steps'?" in str(
        refused.value
    )
