"""Recorded norms: medians by hand, the figures, and the paper's own file if it is here.

SAE_JAX_PAPER_CSV names the folder of the authors' recordings.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from experiments import zf
from sae_jax import settings
from sae_jax.report.layers import Layer, layers_zf_figure, violins_figure


def written(path: Path, rows: list[tuple[float, ...]], names=zf.COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "text"])
        writer.writerows([*row, 'some "text", with commas'] for row in rows)
    return path


def test_medians_by_hand(tmp_path, capsys):
    """F = 11: eps = |z^2 - f^2| / (10 f^2)."""
    path = written(
        tmp_path / "norms.csv",
        [
            *((2, 2.0, 2.0, 0.4), (2, 2.0, 1.0, 0.8), (2, 4.0, 2.0, 1.6)),
            *((1, 1.0, 2.0, 0.5), (1, 1.0, 2.0, 0.5)),
        ],
    )
    zf.run(zf.Config(csv=str(path), n_features=11, out=str(tmp_path / "out")))
    with (tmp_path / "out" / "layers.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["layer"], first["rows"], second["rows"]) == ("1", "2", "3")
    # float32: |1 - 4| / 40 and, of 0, 3 / 10 and 12 / 40, the middle one.
    np.testing.assert_allclose(float(first["epsilon_lbo"]), 0.075, rtol=1e-6)
    np.testing.assert_allclose(float(second["epsilon_lbo"]), 0.3, rtol=1e-6)
    assert float(first["nmse"]) == 0.5
    assert float(second["nmse"]) == 0.1
    assert float(first["norm_ratio"]) == 2
    assert float(second["norm_ratio"]) == 0.5
    said = capsys.readouterr().out
    assert "By median eps-LBO: best layer 1, worst layer 2" in said
    assert "By median NMSE: best layer 2, worst layer 1" in said
    for name in ("zf.png", "violins.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000


def test_what_the_figures_draw():
    rng = np.random.default_rng(0)
    layers = {
        n: Layer(
            z := rng.uniform(1, 9, 50), z * 0.9, rng.random(50), rng.random(50) * n
        )
        for n in (1, 2, 5)
    }
    layers[5].relative_error[0] = 1e6  # clipped, but part of the median
    (axes, _) = layers_zf_figure(layers).axes
    drawn = [line for line in axes.lines if line.get_marker() == "."]
    for line, layer in zip(drawn, layers.values(), strict=True):
        assert sorted(line.get_xdata()) == sorted(layer.norm_z)
        assert sorted(line.get_ydata()) == sorted(layer.norm_f)
    left, right = violins_figure(layers, "layer").axes
    for axes, score in ((left, "epsilon_lbo"), (right, "relative_error")):
        bars = [c for c in axes.collections if hasattr(c, "get_segments")]
        heights = [bar.get_segments()[0][0][1] for bar in bars]
        expected = [np.median(getattr(layer, score)) for layer in layers.values()]
        np.testing.assert_allclose(heights, expected)
    assert right.get_ylim()[1] < 10


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([], zf.COLUMNS, "has no rows"),
        ([(1, 1.0, 1.0, "x")], zf.COLUMNS, "line 2: could not convert"),
        ([(1, 1.0, 1.0)], zf.COLUMNS[:3], "has no column l_recon"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, rows, names, message):
    path = written(tmp_path / "norms.csv", rows, names)
    with pytest.raises(ValueError, match=message):
        zf.read(path, 11)


def test_settings_are_checked_first(tmp_path):
    _, faults = settings.build(zf.Config(), {"csv": str(tmp_path)})
    assert len(faults) == 2
    assert faults[0].startswith("--n_features=0; give the size")
    assert faults[1].endswith("is not a file")


def test_the_papers_recording_ranks_layers_as_the_paper_does(tmp_path, capsys):
    folder = os.environ.get("SAE_JAX_PAPER_CSV")
    if not folder:
        pytest.skip("SAE_JAX_PAPER_CSV does not name the authors' recordings")
    path = Path(folder) / "zf_gpt2_small_res_jb.csv"
    zf.run(zf.Config(csv=str(path), n_features=24_576, out=str(tmp_path)))
    said = capsys.readouterr().out
    assert "By median eps-LBO: best layer 1, worst layer 9" in said
    assert "By median NMSE: best layer 1, worst layer 11" in said
