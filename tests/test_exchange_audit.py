"""The audit of SAEs in every format: one SAE scores the same however it was saved."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments import audit
from sae_jax import load
from tests.test_audit import SITE, configured, saved

WIDTH, FEATURES = 192, 256


def as_gemma_scope(own: Path, to: Path) -> Path:
    """In a folder whose path says layer and hook."""
    params = {n: np.asarray(p) for n, p in load(own).variables.params.items()}
    to = to / "gemma-scope-2b-pt-res" / "layer_1"
    to.mkdir(parents=True)
    arrays = {"W_enc": params["W_enc"].T, "threshold": np.exp(params["log_threshold"])}
    arrays |= {n: params[n] for n in ("W_dec", "b_enc", "b_dec")}
    np.savez(to / "params.npz", **arrays)
    return to


def as_pickles(own: Path, to: Path) -> tuple[Path, Path]:
    """Of dictionary_learning and OpenAI."""
    torch = pytest.importorskip("torch")
    one = load(own).variables.params
    held = {n: torch.from_numpy(np.array(p)) for n, p in one.items()}
    named = {"encoder.weight": held["W_enc"], "decoder.weight": held["W_dec"].T}
    theirs = named | {"encoder.bias": held["b_enc"], "bias": held["b_dec"]}
    (to / "dictionary").mkdir()
    torch.save(theirs, to / "dictionary" / "ae.pt")
    theirs = named | {"latent_bias": held["b_enc"], "pre_bias": held["b_dec"]}
    torch.save(theirs | {"activation": "ReLU"}, to / "openai.pt")
    return to / "dictionary", to / "openai.pt"


@pytest.mark.slow
def test_every_format_is_audited(tmp_path, capsys):
    topk = saved(tmp_path / "topk", "topk(k=8)")
    relu = saved(tmp_path / "relu", "relu")
    jump = saved(tmp_path / "jump", "jump_relu(first_threshold=0.3)", seed=3)
    # Gemma Scope's subtract nothing: the same where b_dec is 0, as it is at first.
    gemma = as_gemma_scope(jump, tmp_path)
    dictionary, openai = as_pickles(relu, tmp_path)
    same = {
        "topk": [
            load(topk).save(tmp_path / "topk_saelens", "saelens"),
            load(topk).save(tmp_path / "topk_sparsify", "sparsify"),
        ],
        "relu": [dictionary, openai],
        "jump": [load(jump).save(tmp_path / "jump_saelens", "saelens"), gemma],
    }
    folders = [topk, relu, jump, *(p for paths in same.values() for p in paths)]
    config = configured(tmp_path / "out", *folders, site=SITE)
    report = dataclasses.replace(config.report, browse=1, steer=0)
    config = dataclasses.replace(config, report=report)
    assert list(config.faults()) == []
    audit.run(config)
    capsys.readouterr()
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(folders)
    for name, paths in same.items():
        for path in paths:
            for score in ("nmse", "l0", "loss_recovered", "coherence_maximum"):
                ours, theirs = float(rows[name][score]), float(rows[path.name][score])
                assert theirs == pytest.approx(ours, rel=1e-4), (path.name, score)


def test_a_path_of_gemma_scope_says_the_site(tmp_path):
    jump = saved(tmp_path / "jump", "jump_relu")
    assert load(as_gemma_scope(jump, tmp_path)).about["site"] == "resid_post.1"
