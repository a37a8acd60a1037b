"""The experiment on known attributes, with IOI and a tiny random GPT-2."""

import importlib
import json

import jax
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

import sae_jax
from sae_jax import settings
from sae_jax.analysis.prompts import draw
from sae_jax.analysis.tasks import TASKS
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.lm.sites import GPT2, tap
from sae_jax.text.tokenizer import load_tokenizer

TINY = {
    "lm_dtype": "float32",
    "context": "32",
    "n_fit": "96",
    "n_tested": "24",
    "contexts": "8",
    "batch": "32",
    "ks": "1,3",
    "factors": "",
    "rule": "topk(k=3)",
    "config.train.steps": "4",
    "config.train.warmup": "0",
    "config.sae.expansion": "2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of GPT-2's layout, whose tokenizer knows the names."""
    folder = tmp_path_factory.mktemp("lm")
    task = TASKS["ioi"].task
    words = [f" {word}" for pool in task.pools.values() for word in pool] * 20
    stories = [story for form in task.forms.values() for story in form]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words + stories, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    ).save_pretrained(folder)
    config = GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=32,
        n_positions=48,
        vocab_size=tokenizer.get_vocab_size(),
        initializer_range=0.3,
    )
    (folder / "config.json").write_text(config.to_json_string())
    params = jax.tree.map(np.asarray, FlaxLM.random(config).params)
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(params))
    return folder


def configured(out, **more):
    experiment = importlib.import_module("experiments.principled")
    config, faults = settings.build(
        experiment.Config(), {**TINY, "out": str(out), **more}
    )
    assert faults == []
    return experiment, config


def test_ioi_is_what_it_should_be(folder):
    known = TASKS["ioi"]
    tokenizer = load_tokenizer(str(folder))
    prompts = draw(known.task, tokenizer, 200)
    for i, text in enumerate(prompts.texts):
        said = {n: known.task.choices(n)[v[i]] for n, v in prompts.values.items()}
        assert text.count(said["io"]) == 1
        assert text.count(said["s"]) == 2
        first = text.index(said["io"]) < text.index(said["s"])
        assert said["pos"] == ("abb" if first else "bab")
        assert tokenizer.decode(prompts.answer[i]).strip() == said["io"]
        assert tokenizer.decode(prompts.wrong[i]).strip() == said["s"]
        at = prompts.positions["s.2"][i]
        assert tokenizer.decode(prompts.tokens[i, at]).strip() == said["s"]
        assert prompts.positions["s"][i] < at < prompts.positions["end"][i]
    for text in known.places:
        site = text.partition("/")[0]
        assert tap(site, GPT2, 12).module.startswith("transformer.h.")


def test_the_experiment_leaves_all_that_it_promises(folder, tmp_path, capsys):
    """With several heads at once, as of GPT-2's own circuit."""
    experiment, config = configured(
        tmp_path, lm=str(folder), task="ioi", places="head_out.1/0@end,head_out.1/3@end"
    )
    experiment.run(config)
    said = capsys.readouterr().out
    text = (tmp_path / "principled.txt").read_text()
    assert text.strip() in said
    for heading in (
        *("Approximation", "Sparse control", "Interpretability"),
        *("Over-splitting", "The task ioi"),
    ):
        assert heading in text
        assert f">{heading}</h2>" in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "principled.json").read_text())
    names = [row["name"] for row in found["dictionaries"]]
    assert names == ["mean", "MSE", "task SAE", "random decoder", "text SAE"]
    clean = {row["ld_clean"] for row in found["dictionaries"]}
    assert clean == {found["model"]["logit_difference"]}
    for row in found["dictionaries"]:
        for name in ("io", "s", "pos"):
            edits = row["edits"][name]
            assert [edit["k"] for edit in edits] == [0, 1, 3]
            assert edits[0]["agreement"] == found["model"][f"{name}: no edit"]
            weights = [edit["weight"] for edit in edits]
            distances = [edit["distance"] for edit in edits[1:]]
            assert distances[0] >= distances[1] > 0
            assert weights[0] == 0
        assert row["l0"] == (3 if row["name"] in ("mean", "MSE") else row["l0"]) <= 3
    for row in found["dictionaries"][2:]:
        assert 0 <= row["f1_median_by_chance"] <= row["f1_median"] + 0.5 <= 1.5
        assert {*row["told"]} == {*row["split"]} == {"io", "s", "pos"}
    assert found["occlusion"] == []
    assert (tmp_path / "figures" / "principled.png").stat().st_size > 5000
    saes = sorted((tmp_path / "saes").iterdir())
    assert len(saes) == 6  # three of each of two heads
    decoders = [sae_jax.load(s).variables.params["W_dec"] for s in saes]
    assert all(rows.shape == (16, 8) for rows in decoders)


@pytest.mark.slow
def test_finished_saes_are_measured_beside_and_an_attribute_is_rescaled(
    folder, tmp_path
):
    sae = sae_jax.SAE(32, 40, rule="topk(k=4)")
    one = sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0)))
    one.save(tmp_path / "mine")
    more = {
        "saes": str(tmp_path / "mine"),
        "places": "resid_post.1@end",
        "factors": "2",
    }
    experiment, config = configured(
        tmp_path / "out", lm=str(folder), task="ioi", **more
    )
    experiment.run(config)
    found = json.loads((tmp_path / "out" / "principled.json").read_text())
    assert found["dictionaries"][-1]["name"] == "mine"
    assert found["dictionaries"][-1]["l0"] <= 4
    first, second = found["occlusion"]
    assert (first["factor"], second["factor"]) == (1, 2)
    moving = {name: s for name, s in found["shares"].items() if s >= 0.01}
    weakest = min(moving, key=moving.get)
    assert first["attribute"] == second["attribute"] == weakest
    assert first["share"] == pytest.approx(found["shares"][weakest])
    assert first["share"] < second["share"] < 4 * first["share"]
    assert "\nOcclusion\n" in (tmp_path / "out" / "principled.txt").read_text()


def test_faults_are_said_before_anything_begins(folder, tmp_path):
    experiment = importlib.import_module("experiments.principled")
    for more, fault in (
        ({"places": "resid_post.9@end"}, "needs a layer from 0 to 1"),
        ({"places": "resid_post/x"}, "is neither"),
        ({"ks": "0"}, "ks must be one or more numbers"),
        ({"batch": "500"}, "batch=500 is more than the n_fit=96 rows"),
        ({"saes": str(tmp_path / "no")}, "no folder or file"),
        (
            {"saes": "x", "places": "resid_post.0@end,resid_post.1@end"},
            "saes are of one site",
        ),
    ):
        given = {"places": "resid_post.1@end"} | more
        given = {**TINY, "lm": str(folder), "task": "ioi", **given}
        faults = settings.build(experiment.Config(), given)[1]
        assert any(fault in said for said in faults), (fault, faults)
