"""Every experiment that trains SAEs, end to end, in a tiny mode."""

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import settings
from sae_jax.activations import Shards
from sae_jax.config import Reporting
from sae_jax.run.log import read_lines
from sae_jax.share import Share
from sae_jax.training.knob import Knob

ROOT = Path(__file__).parent.parent
TINY = {
    "config.train.steps": "6",
    "config.train.warmup": "0",
    "config.data.batch": "64",
    "config.data.buffer": "128",
    "config.data.contexts_per_pass": "2",
    "config.evaluation.contexts": "3",
    "config.every.log": "2",
    "config.every.evaluate": "3",
    "config.sae.expansion": "2",
    "config.report.browse": "1",
    "config.report.steer": "1",
}
TRUTHS = ("pattern", "ablation")
SAES = {
    "demo": ({}, 3),
    "train": ({"rule": "jump_relu(coef=0.001)", "site": "mlp_out.1"}, 1),
    "dark_matter": (
        {
            **dict(rule="topk(k=4)", widths="16,32,64,128", pursuit="false"),
            **{"config.evaluation.contexts": "8"},
        },
        4,
    ),
    "frontier": (
        {"rules": "gradient_topk(k=8),relu", "factors": "0.5,2", "seeds": "3,4"},
        8,
    ),
    "top_afa_gpt2": (
        {
            **dict(lm="embedded", dataset="embedded", sites="resid_pre.1,resid_pre.2"),
            **{"ks": "512,1024", "coefs": "1/32"},
        },
        10,
    ),
}


def configured(name: str, out: Path, **more: str):
    """The experiment and its configuration, as the command line would make it."""
    experiment = importlib.import_module(f"experiments.{name}")
    given = {**TINY, **SAES[name][0], "out": str(out), **more}
    config, faults = settings.build(experiment.Config(), given)
    assert faults == []
    return experiment, config


@pytest.mark.parametrize("name", SAES)
def test_an_experiment_leaves_all_that_it_promises(name, tmp_path, capsys):
    experiment, config = configured(name, tmp_path)
    experiment.run(config)
    said = capsys.readouterr().out
    n_saes = SAES[name][1]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == n_saes
    for row in rows:
        for score in ("l0", "nmse", "explained_variance", "loss_recovered", "dead"):
            assert np.isfinite(float(row[score]))
        assert float(row["epsilon_lbo"]) > 0
        loaded = sae_jax.load(tmp_path / "saes" / row["name"])
        assert loaded.sae.n_features == int(row["n_features"])
        assert loaded.about["site"] == row["site"]
        assert loaded.about["lm"] == "embedded"
        assert row["name"].split("-")[0] in said  # long names are wrapped
        events = list((tmp_path / "tensorboard" / row["name"]).iterdir())
        assert events
    assert str(tmp_path / "report.html") in said
    assert "<table" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["context"] == 128
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"][::n_saes] == [
        2,
        4,
        6,
    ]
    assert [line["step"] for line in lines if line["kind"] == "eval"][::n_saes] == [
        3,
        6,
    ]
    page = (tmp_path / "report.html").read_text()
    for part in ("ZF plot", "Features", "Steered generation", "How it was made"):
        assert f">{part}</h2>" in page
    for figure in ("curves", "frontier", "zf", "violins", "density"):
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 5000


def test_errors_over_widths_of_finished_saes(tmp_path, capsys):
    """Untrained ones, at a site that only they name, with pursuit."""
    dark = importlib.import_module("experiments.dark_matter")
    for width in (64, 128, 256, 512):
        sae = sae_jax.SAE(192, width, rule="topk(k=8)")
        about = {"site": "mlp_out.1", "lm": "embedded"}
        variables = sae.init(jax.random.key(0))
        one = sae_jax.TrainedSAE(sae, variables, about)
        one.save(tmp_path / f"run/saes/F{width}")
    given = {"saes": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    given |= {"config.evaluation.contexts": "8"}
    config, faults = settings.build(dark.Config(), given)
    assert faults == []
    assert config.estimates() == {}
    dark.run(config)
    said = capsys.readouterr().out
    text = (tmp_path / "out" / "dark_matter.txt").read_text()
    assert text in said
    assert "F64 is left out" not in text
    found = json.loads((tmp_path / "out" / "dark_matter.json").read_text())
    assert [row["n_features"] for row in found["saes"]] == [64, 128, 256, 512]
    for row in found["saes"]:
        assert 0 < row["pursuit_fvu"] < row["fvu"]
    assert {*found["laws"], *found["no_law"]} == {
        "fvu",
        "fvu_nonlinear",
        "pursuit_fvu_nonlinear",
    }
    assert [*found["tokens"]] == ["F128", "F256", "F512"]
    assert all(one["r2"] > 0.3 > one["by_chance"] for one in found["tokens"].values())
    assert (tmp_path / "out" / "figures" / "dark_matter.png").stat().st_size > 5000
    assert ">Over widths</h2>" in (tmp_path / "out" / "report.html").read_text()
    given["saes"] += ",/no/such"
    assert "no folder or file /no/such" in str(settings.build(dark.Config(), given)[1])
    few = {"config.evaluation.contexts": "4", "out": str(tmp_path / "new")}
    faults = settings.build(dark.Config(), few)[1]
    assert "contexts=4 are 256 tokens to fit a map of 192" in str(faults)


def test_a_concept_of_a_folder_of_texts_is_erased(tmp_path, capsys):
    """With an untrained SAE; all that is promised is left, and what it says adds up."""
    experiment = importlib.import_module("experiments.erase")
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):  # a name's hash says which part it is of
        word = "pear plum" if i % 3 else "socket listens"
        (folder / f"{i}.txt").write_text(
            f"the {word} of row {i} is here, said {i}. " * 9
        )
    sae = sae_jax.SAE(192, 256, rule="topk(k=8)")
    about = {"site": "mlp_out.1", "lm": "embedded"}
    one = sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0)), about)
    one.save(tmp_path / "run/saes/one")
    given = {"sae": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    given |= {"dataset": str(folder), "words": "pear,plum", "paraphrase": "a,b"}
    given |= {"contexts": "6", "targets": "2", "retained": "2", "draws": "2"}
    given |= {"strongest": "20", "least": "2", "contexts_per_pass": "4"}
    config, faults = settings.build(experiment.Config(), given)
    assert faults == []
    experiment.run(config)
    assert (tmp_path / "out/erase.txt").read_text() in capsys.readouterr().out
    found = json.loads((tmp_path / "out/erase.json").read_text())["saes"]["one"]
    chosen, by_lot = found["effects"]
    assert len(found["features"]) == chosen["features"] > 0
    for row in (chosen, by_lot):
        for kind in ("concept", "paraphrased", "other"):
            assert 0 < row[f"{kind}_contexts"] <= 6
            assert 0 <= row[f"{kind}_edited"] <= 1
            assert row[f"{kind}_kl_erased"] > 0
        assert abs(row["concept_auroc_by_chance"] - 0.5) < 0.1
    page = (tmp_path / "out/report.html").read_text()
    assert ">Erasing a concept: one</h2>" in page
    assert (tmp_path / "out/figures/erase1.png").stat().st_size > 5000
    for wrong, fault in (
        ({"paraphrase": "a"}, "words are 2 and paraphrase 1"),
        ({"prompts_part": "heldout"}, "share documents"),
        ({"join": "true"}, "give --join=false"),
        ({"skip": "0"}, "position 0 is never edited"),
    ):
        faults = settings.build(experiment.Config(), given | wrong)[1]
        assert [said for said in faults if fault in said], faults
    rare = settings.build(experiment.Config(), given | {"words": "yes,no"})[0]
    with pytest.raises(ValueError, match="no text of kind concept among the first"):
        experiment.run(rare)


def dialogues_file(folder: Path, n: int = 60) -> Path:
    """Short dialogues, every fifth of which repeats a long answer."""
    folder.mkdir()
    long = " ".join(f"word{j}" for j in range(25))
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(n):
            answer = long if i % 5 == 0 else f"return {i}\n" * (1 + i % 7)
            said = [("user", f"What is {i}?"), ("assistant", answer)]
            messages = [{"role": r, "content": c} for r, c in said]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


def test_dialogues_alone_and_in_blocks_are_compared(tmp_path, capsys):
    """Given dialogues, of which those that repeat others are left out; then resumed."""
    experiment = importlib.import_module("experiments.fast")
    given = {**TINY, "rules": "topk(k=4),relu", "context": "32", "scored": "4"}
    given |= {"dialogues": str(dialogues_file(tmp_path / "given"))}
    out = tmp_path / "out"
    config, faults = settings.build(experiment.Config(), given | {"out": str(out)})
    assert faults == []
    experiment.run(config)
    said = capsys.readouterr().out
    assert (out / "fast.txt").read_text() in said
    written = [
        json.loads(line)["messages"][1]["content"]
        for part in ("train", "heldout")
        for line in (out / f"dialogues/{part}/dialogues.jsonl").read_text().splitlines()
    ]
    assert len([one for one in written if "word3" in one]) == 1
    assert 30 < len(written) < 60
    found = json.loads((out / "fast.json").read_text())["saes"]
    assert [row["name"] for row in found] == [
        f"{name}-{way}"
        for way in ("fast", "blocks", "plain")
        for name in ("topk-k4", "relu-coef0.001")
    ]
    for row in found:
        assert 0 < row["mse"] != row["mse_special"] > 0
        assert row["log2_mse_special"] == np.log2(row["mse_special"])
        assert np.isfinite(row["loss_recovered"])
    for way in ("fast", "blocks", "plain"):
        made_by = json.loads((out / way / "config.json").read_text())
        assert (made_by["whole"], made_by["join"]) == ((way == "fast"), way != "fast")
        assert made_by["data"]["mixing"] == ("neighbours", "buffer")[way == "fast"]
    assert (out / "figures" / "fast.png").stat().st_size > 5000
    assert experiment.TITLE in (out / "report.html").read_text()
    # A finished run is shown again; other settings are refused.
    text = (out / "fast.json").read_bytes()
    experiment.run(config)
    assert (out / "fast.json").read_bytes() == text
    other = given | {"out": str(out), "config.train.steps": "5"}
    faults = settings.build(experiment.Config(), other)[1]
    assert len(faults) == 3
    assert "holds a run with other settings" in faults[0]
    for wrong, fault in (
        ({"chat_template": ""}, "the tokenizer has no chat template"),
        ({"dialogues": str(tmp_path / "no")}, "dialogues: "),
        ({"whole": "true"}, "give join=False with it"),
    ):
        faults = settings.build(
            experiment.Config(), given | {"out": str(tmp_path / "new")} | wrong
        )[1]
        assert [one for one in faults if fault in one], faults


def test_neuron_groups_beside_an_sae(tmp_path, capsys):
    experiment = importlib.import_module("experiments.snmf")
    given = {
        **dict(out=str(tmp_path), k="8", steps="4", contexts="2", levels="4,2"),
        **dict(sae_steps="4", held_out="4", steered="2", amounts="1,2", texts="2"),
        **dict(planted="0", rule="topk(k=2)"),
    }
    config, faults = settings.build(experiment.Config(), given)
    assert faults == []
    experiment.run(config)
    text = (tmp_path / "snmf.txt").read_text()
    assert text in capsys.readouterr().out
    found = json.loads((tmp_path / "snmf.json").read_text())
    assert found["planted"] == []  # they take a minute
    assert found["scores"]["snmf"]["neurons"] == 39  # of 768, a twentieth
    for rows in found["features"].values():
        assert len(rows) == 8
    assert [row["amount"] for row in found["steering"]["SAE, shuffled"]] == [1, 2]
    assert len(found["steering"]) == 6
    for rows in found["steering"].values():
        assert all(0 <= row["both"] <= 1 for row in rows)
    assert [(row["way"], row["k"]) for row in found["levels"]] == [
        ("factored", 4),
        ("factored", 2),
        ("tuned", 2),
    ]
    assert (tmp_path / "figures" / "snmf.png").stat().st_size > 5000
    assert ">Neuron groups beside an SAE</h2>" in (tmp_path / "report.html").read_text()
    given = {"layer": "4", "part": "heldout", "share": "0", "steered": "1"}
    faults = "\n".join(settings.build(experiment.Config(), given)[1])
    for fault in (
        "mlp_hidden.4' needs a layer from 0 to 3",
        "part=heldout is what concepts",
        "share=0.0 must be above 0",
        "steered and held_out must be at least 2",
    ):
        assert fault in faults


def test_circuits_by_codes(tmp_path, capsys):
    experiment = importlib.import_module("experiments.circuits")
    given = {"out": str(tmp_path), "steps": "3", "prompts": "3", "length": "8"}
    given |= {"repeating": "2", "seeds": "0,1", "n_features": "16"}
    given |= {"text_contexts": "64"}
    config, faults = settings.build(experiment.Config(), given)
    assert faults == []
    experiment.run(config)
    text = (tmp_path / "circuits.txt").read_text()
    assert text in capsys.readouterr().out
    found = json.loads((tmp_path / "circuits.json").read_text())
    kinds = [(row["model"], row["truth"], row["seed"]) for row in found["rows"]]
    assert len(kinds) == len(set(kinds)) == 2 + 2 * 2 * 2
    assert {kind[:2] for kind in kinds} == {
        ("planted vectors", "planted"),
        *((m, t) for m in ("trained to repeat", "embedded") for t in TRUTHS),
    }
    for row in found["rows"]:
        if 0 < row["in_circuit"] < row["heads"]:
            assert 0 <= row["node_auc"] <= 1
            assert 0 <= row["node_auc_shuffled"] <= 1
    heads = found["heads"]["embedded"]
    assert len(heads["attention"]) == len(heads["rise"]) == len(heads["score"]) == 24
    assert heads["none"] > heads["clean"]
    assert (tmp_path / "figures" / "circuits.png").stat().st_size > 5000
    page = (tmp_path / "report.html").read_text()
    assert ">Heads and pairs of the circuit</h2>" in page
    given = {"length": "48", "prompts": "1", "text_contexts": "9"}
    faults = "\n".join(settings.build(experiment.Config(), given)[1])
    assert "length=48 must be from 2 to 47" in faults
    assert "text_contexts=9 must be at least 64" in faults
    assert "two prompts" in faults


def test_the_papers_comparison_is_written_beside_the_report(tmp_path, capsys):
    small = importlib.import_module("experiments.top_afa_small")
    more = {"sites": "resid_pre.1", "ks": "512,1024", "coefs": "1/32", "seeds": "0,1"}
    given = {**TINY, **more, "config.sae.n_features": "64", "out": str(tmp_path)}
    config, faults = settings.build(small.Config(), given)
    assert faults == []
    small.run(dataclasses.replace(config, report=Reporting(browse=0)))
    text = (tmp_path / "comparison.txt").read_text()
    assert text in capsys.readouterr().out
    for part in (
        "top_afa: L0, NMSE",
        "topk | batch_topk",
        "Over seeds",
        "What the paper says",
    ):
        assert part.lower() in text.lower(), part
    with (tmp_path / "comparison.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5  # settings, of two seeds each
    assert (tmp_path / "figures" / "comparison.png").stat().st_size > 5000
    page = (tmp_path / "report.html").read_text()
    assert ">The comparison</h2>" in page
    # Settings that change no SAE may be others when the folder is used again.
    again = dataclasses.replace(config, last=3, report=Reporting(browse=1, steer=0))
    assert again.conflicts() == []
    assert "paper='/no' holds no" in str(
        dataclasses.replace(config, paper="/no").conflicts()
    )


def test_a_finished_run_is_shown_again_and_trains_no_more(tmp_path, capsys):
    experiment, config = configured("train", tmp_path)
    experiment.run(config)
    first = capsys.readouterr().out
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("sae.safetensors"))}
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    experiment.run(config)
    assert capsys.readouterr().out == first
    assert {p: p.read_bytes() for p in before} == before
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_from_shards_and_as_a_transcoder(tmp_path):
    harvest = importlib.import_module("experiments.harvest")
    sites = ("resid_mid.1", "mlp_out.1")
    harvest.run(harvest.Config(out=str(tmp_path / "shards"), sites=sites, rows=300))
    more = {"site": sites[0], "target": sites[1], "rule": "topk(k=4)"}
    more["config.data.shards"] = str(tmp_path / "shards")
    experiment, config = configured("train", tmp_path / "run", **more)
    experiment.run(config)
    sae = sae_jax.load(tmp_path / "run" / "saes" / "topk-k4")
    assert sae.sae.is_transcoder
    rows = Shards(tmp_path / "shards").rows(np.arange(5), sites)
    assert sae(jnp.asarray(rows[sites[0]], jnp.float32))[0].shape == (5, 192)


def test_shards_without_gradients_are_refused_with_the_command_that_gets_them(tmp_path):
    """A rule that needs them trains on those of that command, and on the fly."""
    harvest = importlib.import_module("experiments.harvest")
    experiment = importlib.import_module("experiments.train")
    site, bare, graded = "resid_pre.1", str(tmp_path / "a"), str(tmp_path / "b")
    given = {**TINY, "site": site, "rule": "gradient_topk(k=8)"}
    given["out"] = str(tmp_path / "run")
    harvest.run(harvest.Config(out=bare, sites=(site,), rows=200))
    _, faults = settings.build(
        experiment.Config(), {**given, "config.data.shards": bare}
    )
    [fault] = faults
    assert f"holds no gradients of the model's loss at {site}, which a rule" in fault
    command = f"--experiment=harvest --gradients=true --sites={site} --out=FOLDER"
    assert command in fault
    asked = {"gradients": "true", "sites": site, "rows": "200", "out": graded}
    config, _ = settings.build(harvest.Config(), asked)
    assert "1 sites with their gradients, 384 wide" in config.estimates()["rows"]
    harvest.run(config)
    name = sae_jax.gradient_of(site)
    opened = config.open_lm(), config.open_tokenizer()
    for shards in (graded, ""):
        config, faults = settings.build(
            experiment.Config(), {**given, "config.data.shards": shards}
        )
        assert faults == []
        stream = config.open_stream(*opened)
        assert stream.widths == {site: 192, name: 192}
        batch = next(stream.batches())
        assert batch[name].shape == batch[site].shape
        assert (batch[name] != 0).any()
    assert "memory for the model's gradients" in config.estimates()
    buffers = 3 * 128 * 2 * 192 * 4 / 1e9
    assert config.estimates()["memory for activations"] == f"{buffers:.2g} GB"


def test_shards_of_another_model_are_refused(tmp_path):
    harvest = importlib.import_module("experiments.harvest")
    harvest.run(harvest.Config(out=str(tmp_path / "a"), rows=300, sites=("mlp_out.1",)))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    experiment, config = configured("train", tmp_path / "run")
    data = dataclasses.replace(config.data, shards=str(tmp_path / "a"))
    config = dataclasses.replace(config, data=data)
    assert list(config.faults()) == []
    manifest["made_by"]["weights"] = "0123456789abcdef"
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="made by another harvest"):
        experiment.run(config)


def test_the_papers_grids_at_its_own_size_and_scaled():
    experiment = importlib.import_module("experiments.top_afa_gpt2")
    config = experiment.Config(lm="embedded", sites=("resid_pre.1",))
    wanted = [w.rule for w in config.wanted()]  # 3,072 features of width 192
    assert wanted[0] == "topk(k=8)"
    assert "batch_topk(k=2048)" in wanted
    assert "top_afa(coef=0.125)" in wanted
    assert len(wanted) == 9 * 2 + 5
    large = dataclasses.replace(config.sae, n_features=24_576)
    wanted = [w.rule for w in dataclasses.replace(config, sae=large).wanted()]
    assert wanted[0] == "topk(k=32)"


def test_faults_name_what_does_not_fit(tmp_path):
    experiment = importlib.import_module("experiments.frontier")
    config = experiment.Config(
        out=str(tmp_path),
        rules=("topk(k=5000)", "top_afa"),
        factors=(1.0,),
        dataset="/no/such",
    )
    train = dataclasses.replace(config.train, knob=Knob(target_l0=50.0))
    faults = "\n".join(dataclasses.replace(config, train=train).faults())
    assert "/no/such" in faults
    assert "k=5000 must be above 0 and at most n_features=1536" in faults
    assert "Nothing can steer top_afa" in faults
    for changes, fault in (
        ({"context": 1000, "skip": -1}, "context=1000 is more than the 256 tokens"),
        ({"context": 1000, "skip": -1}, "skip=-1 less"),
        ({"site": "resid_post.9"}, "needs a layer from 0 to 3"),
        ({"rules": ()}, "no SAE is asked for"),
        ({"part": "all"}, "evaluation.part='heldout' is trained on as well"),
    ):
        faults = dataclasses.replace(config, **changes).faults()
        assert any(fault in said for said in faults), fault


def test_the_folder_is_looked_at_once_nothing_else_is_wrong(tmp_path):
    (tmp_path / "file").touch()
    experiment = importlib.import_module("experiments.train")
    given = {"out": str(tmp_path)}
    faults = settings.build(experiment.Config(), given)[1]
    assert "is not empty and holds no run" in "".join(faults)
    assert faults[0].startswith(f"--out: {tmp_path}")
    faults = settings.build(experiment.Config(), {**given, "context": "1"})[1]
    assert len(faults) == 1
    assert "must be at least 2" in faults[0]


def test_a_rule_file_is_known_by_its_content(tmp_path):
    experiment = importlib.import_module("experiments.train")
    (tmp_path / "a.py").write_text("one = 1")
    first = experiment.Config(rule_files=(str(tmp_path / "a.py"),)).identity()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    moved = experiment.Config(rule_files=(str(tmp_path / "b.py"),)).identity()
    (tmp_path / "b.py").write_text("one = 2")
    edited = experiment.Config(rule_files=(str(tmp_path / "b.py"),)).identity()
    assert first == moved != edited


def test_estimates_count_parameters_tokens_and_memory(tmp_path):
    _, config = configured("frontier", tmp_path)
    said = config.estimates()
    each = 2 * 192 * 384 + 192 + 384
    assert said["SAEs"] == f"8 of {each:,} parameters"
    assert said["tokens"].startswith("384 (6 steps of 64)")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"readers": "3"}, "--config.data.readers=3 must divide the batch, 64."),
        ({"readers": "0"}, "batch, contexts_per_pass and readers must be at least 1."),
        ({"readers": "2", "shards": "x"}, "readers=2 are for text, and shards='x' are"),
        ({"mixing": "buffer", "shards": "x"}, "mixing='buffer' is for text, and"),
        ({"readers": "4", "buffer": "64"}, "buffer=64 must be a multiple of twice the"),
    ],
)
def test_readers_that_do_not_fit_the_data_are_faults(given, fault):
    experiment = importlib.import_module("experiments.train")
    given = {f"config.data.{name}": value for name, value in given.items()}
    faults = settings.build(experiment.Config(), {**TINY, **given})[1]
    assert [said for said in faults if fault in said], faults


def test_a_share_of_the_batches_of_an_experiment(tmp_path):
    harvest = importlib.import_module("experiments.harvest")
    site, folder = "resid_pre.1", str(tmp_path / "shards")
    harvest.run(harvest.Config(out=folder, sites=(site,), rows=300))
    for more in ({"config.data.readers": "2"}, {"config.data.shards": folder}):
        _, config = configured("train", tmp_path / "run", site=site, **more)
        opened = config.open_lm(), config.open_tokenizer()
        whole = next(config.open_stream(*opened).batches())
        part = next(config.open_stream(*opened, Share(1, 2)).batches())
        np.testing.assert_array_equal(part[site], whole[site][32:])
