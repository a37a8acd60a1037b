"""The audit of finished SAEs, end to end, and what it refuses."""

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import audit
from experiments._features import samples, worth_steering
from experiments._report import one_of_each_rule
from sae_jax import SAE, coherence, settings
from sae_jax.evaluation import Evaluator, HeldOut
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.text import load_tokenizer
from sae_jax.trained import TrainedSAE

SITE = "resid_post.1"
ROOT = Path(__file__).parent.parent


def saved(folder: Path, rule: str, *, seed: int = 0, site: str = SITE, **about) -> Path:
    """An SAE that nobody trained."""
    sae = SAE(d_in=192, n_features=256, rule=rule)
    variables = sae.init(jax.random.key(seed))
    known = {"site": site, "target": None, "seed": seed, "lm": "embedded"} | about
    return TrainedSAE(sae, variables, known).save(folder)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def configured(out: Path, *saes: Path, **changes) -> audit.Config:
    config = audit.Config(sae=tuple(map(str, saes)), out=str(out), contexts=3)
    report = dataclasses.replace(config.report, steer=1)
    return dataclasses.replace(config, report=report, **changes)


def test_an_audit_has_every_measure_and_a_report(tmp_path, capsys):
    saes = [saved(tmp_path / f"a{n}", "topk(k=8)", seed=n) for n in (0, 1)]
    saes.append(saved(tmp_path / "b", "top_afa", seed=2))
    config = configured(tmp_path / "out", *saes)
    assert list(config.faults()) == []
    audit.run(config)
    said = capsys.readouterr().out
    scores = (tmp_path / "out" / "scores.txt").read_text()
    assert scores in said
    lines = {line[:30].strip(): line for line in scores.splitlines()}
    assert lines["L0, features"].split()[-3:-1] == ["8.0", "8.0"]
    exact = coherence.exact(audit.opened(config.sae)["b"].variables.params["W_dec"])
    assert lines["coherence, maximum"].split()[-1] == f"{exact.maximum:.4f}"
    for name in ("KL, nats", "loss recovered, %", "L1", "description length, bits"):
        assert np.isfinite([number(v) for v in lines[name].split()[-3:]]).all()
    # Every ordered pair at one site; random directions agree a little.
    pairs = re.findall(r"(\w+) in (\w+): mean (0\.\d+) \(random", scores)
    assert len(pairs) == 6
    assert all(0.1 < float(mean) < 0.5 for _, _, mean in pairs)
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a0", "a1", "b"]
    assert float(rows[2]["coherence_maximum"]) == exact.maximum
    page = (tmp_path / "out" / "report.html").read_text()
    for part in ("All scores", "Agreement of dictionaries", "Steered generation"):
        assert part in page
    for figure in ("zf", "violins", "density"):
        assert (tmp_path / "out" / "figures" / f"{figure}.png").stat().st_size > 5000


def test_errors_are_split_and_what_cannot_be_is_said(tmp_path, capsys):
    saes = [saved(tmp_path / f"a{n}", "topk(k=8)", seed=n) for n in (0, 1)]
    config = configured(tmp_path / "out", *saes, contexts=8, pursuit=True)
    report = dataclasses.replace(config.report, browse=0)
    audit.run(dataclasses.replace(config, report=report))
    said = capsys.readouterr().out
    lines = {line[:33].strip(): line.split()[-2:] for line in said.splitlines()}
    fvu, rest, shuffled, pursuit = (
        np.array([number(v) for v in lines[name]])
        for name in (
            "FVU",
            "FVU, nonlinear error",
            "R2 of error from shuffled rows",
            "FVU, gradient pursuit",
        )
    )
    assert (rest < fvu).all()
    assert (shuffled < 0.1).all()
    assert (pursuit < fvu).all()
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [f"{float(row['dark_fvu']):.4f}" for row in rows] == lines["FVU"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Linear and nonlinear error" in page
    halves = re.search(r"first half of the contexts, (\d+) .* second, (\d+)", page)
    assert all(480 < int(n) <= 512 for n in halves.groups())  # 4 contexts, less BOS
    few = dataclasses.replace(config, contexts=3, report=report)
    audit.run(few)
    assert re.search(r"a1 is left out: 12\d rows to fit", capsys.readouterr().out)
    audit.run(dataclasses.replace(few, dark_matter=False))
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sae": ()}, "sae is empty"),
        ({"sae": ("/no/such",)}, "no folder or file /no/such"),
        ({"sae": ("/tmp",)}, "no SAE in a known format"),
        ({"contexts": 0}, "contexts and contexts_per_pass must be at least 1"),
        ({"site": "resid_post.9"}, "needs a layer from 0 to 3"),
        ({"site": "mlp_hidden.1"}, "is made for a width of 192, and mlp_hidden.1"),
        ({"context": 1000}, "context=1000 is more than the 256 tokens"),
        ({"dataset": "/no/such"}, "dataset: "),
    ],
)
def test_what_does_not_fit_is_said_first(tmp_path, changes, fault):
    config = configured(tmp_path / "out", saved(tmp_path / "a", "topk(k=8)"))
    found = list(dataclasses.replace(config, **changes).faults())
    assert any(fault in said for said in found), found


def test_an_sae_without_a_site_needs_one(tmp_path):
    folder = saved(tmp_path / "a", "topk(k=8)", site=None)
    config = configured(tmp_path / "out", folder)
    assert any("give --site" in fault for fault in config.faults())
    assert list(dataclasses.replace(config, site=SITE).faults()) == []


def test_another_model_is_refused_and_the_same_text_is_noted(tmp_path, capsys):
    text = audit.Config(part="train").text()
    other = saved(tmp_path / "a", "topk(k=8)", lm_weights="0123", text=text)
    config = configured(tmp_path / "out", other, part="train")
    with pytest.raises(ValueError, match="was trained on lm='embedded', whose weights"):
        audit.run(config)
    same = saved(tmp_path / "b", "topk(k=8)", text=text)
    report = dataclasses.replace(config.report, browse=0)
    audit.run(dataclasses.replace(config, sae=(str(same),), report=report))
    assert "b was trained on this text" in capsys.readouterr().out
    assert "b was trained on this text" in (tmp_path / "out/scores.txt").read_text()
    elsewhere = dataclasses.replace(config, sae=(str(same),), report=report)
    audit.run(dataclasses.replace(elsewhere, site="resid_post.0"))
    said = capsys.readouterr().out
    assert "b was trained on resid_post.1, and is measured elsewhere" in said


def test_names_tell_saes_apart(tmp_path):
    folders = [saved(tmp_path / run / "topk", "topk(k=8)") for run in ("x", "y")]
    assert [*audit.opened(tuple(map(str, folders)))] == ["x/topk", "y/topk"]
    with pytest.raises(ValueError, match="names a folder twice"):
        audit.opened((str(folders[0]), str(folders[0])))


def test_a_runs_folder_stands_for_its_saes_and_is_not_written_to(tmp_path):
    saved(tmp_path / "run/saes/a", "topk(k=8)")
    saved(tmp_path / "run/saes/b", "topk(k=8)")
    (tmp_path / "run/config.json").write_text("{}")
    assert [*audit.opened((str(tmp_path / "run"),))] == ["a", "b"]
    config = configured(tmp_path / "run", tmp_path / "run")
    assert any("holds a training run" in fault for fault in config.faults())


def test_an_sae_with_a_rule_of_ones_own_is_audited(tmp_path):
    rule = (
        "import jax\nfrom sae_jax import Rule, from_pre, register\n"
        "def halved(pre, *, share: float = 0.5):\n    return jax.nn.relu(pre) * share\n"
        "register(Rule(name='halved', paper='none', decides='nothing', "
        "encode=from_pre(halved), example={'share': 0.5}, knob='share'))\n"
    )
    (tmp_path / "halved.py").write_text(rule)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\nimport sae_jax\n"
        f"sae_jax.load_file({str(tmp_path / 'halved.py')!r})\n"
        "from tests.test_audit import saved\n"
        f"saved(Path({str(tmp_path / 'a')!r}), 'halved')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    command = [sys.executable, "launch.py", "--experiment=audit", "--dry_run"]
    command += [f"--sae={tmp_path / 'a'}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "--rule_files" in done.stderr
    command.append(f"--rule_files={tmp_path / 'halved.py'}")
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def test_settings_come_from_the_command_line(tmp_path):
    folder = saved(tmp_path / "a", "topk(k=8)")
    given = {"sae": str(folder), "config.report.steer": "0", "contexts": "2"}
    config, faults = settings.build(audit.Config(), given)
    assert faults == []
    assert (config.sae, config.report.steer) == ((str(folder),), 0)


def test_one_of_each_rule_that_activates_as_it_should_and_did_not_diverge():
    nan = float("nan")
    rows = [
        {"name": name, "rule": name[0], "nmse": nmse, "epsilon_lbo": epsilon}
        for name, nmse, epsilon in (
            *(("a1", nan, nan), ("a2", 0.5, 0.1), ("a3", 0.4, 0.2)),
            *(("b1", 0.3, float("inf")), ("b2", nan, 0.0), ("c1", nan, nan)),
        )
    ]
    assert one_of_each_rule(rows) == ["a2", "b1"]


def test_an_sae_that_diverged_is_measured_and_not_looked_into(tmp_path, capsys):
    sae = SAE(d_in=192, n_features=64, rule="relu")
    variables = sae.init(jax.random.key(0))
    for n, name in enumerate(("W_dec", "b_enc")):
        bad = {**variables.params, name: variables.params[name].at[1].set(jnp.nan)}
        about = {"site": SITE, "target": None}
        spoilt = variables._replace(params=bad)
        TrainedSAE(sae, spoilt, about).save(tmp_path / f"bad{n}")
    zero = {**variables.params, "W_dec": variables.params["W_dec"].at[1].set(0)}
    whole = TrainedSAE(sae, variables._replace(params=zero), about)
    folders = [whole.save(tmp_path / "zero"), tmp_path / "bad0", tmp_path / "bad1"]
    audit.run(configured(tmp_path / "out", *folders))
    said = capsys.readouterr().out
    assert "Looking into the features of zero ..." in said
    lines = [line.split()[-3:] for line in said.splitlines() if line.startswith("NMSE")]
    assert [text != "nan" for text in lines[0]] == [True, False, False]


def test_features_worth_steering_are_neither_rare_nor_everywhere():
    class Found:
        density = np.array([0.5, 0.05, 0.01, 0.02, 0.001])
        strength = np.array([9.0, 1.0, 2.0, 3.0, 8.0])

        class firings:
            use = np.ones((10, 100), bool)

    assert worth_steering(Found()) == [3, 2, 1]


def test_prompts_of_steering_are_the_text_that_excites_a_feature():
    lm, tokenizer = FlaxLM.load("embedded"), load_tokenizer("embedded")
    rng, bos = np.random.default_rng(0), tokenizer.bos_token_id
    tokens = rng.integers(300, 600, (3, 64)).astype(np.int32)
    tokens[1, 0] = bos
    real = np.ones(tokens.shape, bool)
    evaluator = Evaluator(lm, HeldOut(tokens, real, real))
    sae = SAE(d_in=192, n_features=8, rule="relu")
    one = TrainedSAE(sae, sae.init(jax.random.key(0)), {"site": SITE})

    def example(row: int) -> str:
        class Found:
            class firings:
                pass

            examples, highest = np.array([[row]]), np.array([1.5])

        Found.firings.tokens = tokens
        said = dict(samples(one, Found(), 0, evaluator, tokenizer))
        assert said["prompt"] == tokenizer.decode(tokens[0, :24])
        return said["its strongest example"]

    assert example(40) == tokenizer.decode(tokens[0, 17:41])
    assert example(64 + 40) == tokenizer.decode([bos, *tokens[1, 18:41]])
    assert example(64 + 3) == tokenizer.decode(tokens[1, :4])
    assert example(128) == tokenizer.decode(tokens[2, :1])
