"""The experiment that explains features, end to end, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import interpret
from sae_jax import SAE
from sae_jax.trained import TrainedSAE

LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE that nobody trained."""
    sae = SAE(d_in=192, n_features=64, rule="topk(k=8)")
    variables = sae.init(jax.random.key(0))
    about = {"site": "resid_post.1", "target": None, "lm": "embedded"}
    return TrainedSAE(sae, variables, about).save(
        tmp_path_factory.mktemp("sae") / "one"
    )


def configured(folder: Path, out: Path, **changes) -> interpret.Config:
    config = interpret.Config(sae=(str(folder),), out=str(out), contexts=12)
    small = {"n_features": 3, "least": 40, "length": LENGTH, "shown": 10, "tested": 10}
    return dataclasses.replace(config, **small | changes)


def test_features_are_explained_and_judged_beside_chance(folder, tmp_path, capsys):
    config = configured(folder, tmp_path, surprisal=True, intervention=0.05)
    assert list(config.faults()) == []
    interpret.run(config)
    rows = json.loads((tmp_path / "interpretations.json").read_text())
    assert len(rows) == 3
    for row in rows:
        assert row["says"]
        assert (row["n_on"], row["n_off"], row["n_failed"]) == (10, 10, 0)
        for kind in ("detection_auroc", "fuzzing_auroc"):
            assert 0 <= row[kind] <= 1
            assert 0 <= row[f"{kind}_by_chance"] <= 1
        assert 0 <= row["surprisal_auroc"] <= 1
        assert row["intervention_strength"] > 0
        assert np.isfinite(row["intervention"])
    text = (tmp_path / "interpretations.txt").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[1] == "one: 3 features"
    for kind in ("detection_auroc", "detection_auroc_by_chance"):
        assert f"{np.median([row[kind] for row in rows]):.2f}" in lines[-1]
    assert not (tmp_path / "answers.jsonl").exists()


class Answers:
    """In place of an endpoint: one sentence, or as many ones as were asked for."""

    asked = 0

    def __init__(self, url, model, *, key):
        assert (url, model) == ("http://here/v1", "some")

    def __call__(self, messages):
        Answers.asked += 1
        instruction = messages[0]["content"]
        if " list of " not in instruction:
            return "It fires on something."
        assert "It fires on something." in instruction
        n = int(re.search(r" list of (\d+) numbers", instruction)[1])
        return str([1] * n)


def test_what_a_model_said_is_asked_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(interpret, "Endpoint", Answers)
    config = configured(
        folder,
        tmp_path,
        features=(1, 2),
        explainer="model",
        judge="model",
        endpoint="http://here/v1",
        model="some",
    )
    assert list(config.faults()) == []
    interpret.run(config)
    path = tmp_path / "interpretations.json"
    first, asked = path.read_text(), Answers.asked
    rows = json.loads(first)
    assert [row["feature"] for row in rows] == [1, 2]
    assert {row["says"] for row in rows} == {"It fires on something."}
    # Who says yes to everything is right by half, and no better than chance.
    for row in rows:
        assert row["detection_auroc"] == row["detection_accuracy"] == 0.5
        assert row["detection_auroc_by_chance"] == 0.5
    interpret.run(config)
    assert (Answers.asked, path.read_text()) == (asked, first)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"explainer": "model", "judge": "model"}, "model is empty"),
        ({"model": "some"}, "nothing is asked of a model"),
        ({"explainer": "model", "model": "some"}, "knows only what explainer=rules"),
        ({"n_features": 0}, "n_features must be at least 1"),
        ({"length": 1000}, "length=1000 must be from 1 to the context"),
        ({"features": (3, 64)}, r"features [64] are none of one's 64"),
    ],
)
def test_faults_are_named_before_anything_is_read(folder, tmp_path, changes, fault):
    (said,) = configured(folder, tmp_path, **changes).faults()
    assert fault in said
