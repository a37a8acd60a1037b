"""Times how a training step grows: with rows, with features, and with the budget.

One size changes and the others stay in the middle: B=1024, F=12288, k=32. Each point
is a pair of processes that take turns, our training step and the encoder's product
alone, with rows and first weights as `bench` has them; what is measured is said there.

The slope is the exponent of a power law, `time ~ size^slope`: 1 is growth in
proportion, 0 none; `_growth` says how it is fitted. The product does not know k: how
far its slope along k is from 0 says how quiet the machine was.

Command:  python launch.py --experiment=bench_growth
Hardware: 2 CPU cores with nothing else on them, 10 GB, about ten minutes.
Leaves:   out/bench_growth.json, bench_growth.png

Columns of points: rule; B rows in a batch; D their width; F features; k (none where the
rule has no budget); ms, ms_min, ms_max: median, least and most of our steps; floor_ms:
median of the product; ratio: ours over the product, median within rounds. A point that
several axes share is timed once. Columns of slopes: rule; axis; points: their number;
slope, slope_error: of our steps; floor_slope, floor_slope_error: of the product. An
error is none where two points determine the line.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from experiments import _bench_timing, _growth, bench
from experiments._bench_timing import FLOOR, OURS, Timed
from sae_jax import registry
from sae_jax.settings import Spec
from sae_jax.whole_files import write_whole


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/bench_growth"
    rules: Annotated[tuple[Spec, ...], "rules to time, each once; the budget is k"] = (
        Spec("topk"),
        Spec("batch_topk"),
        Spec("top_afa"),
    )
    batches: Annotated[tuple[int, ...], "rows in a batch, along B"] = (
        *(256, 512, 1024, 2048, 4096),
    )
    features: Annotated[tuple[int, ...], "sizes of the dictionary, along F"] = (
        *(3072, 6144, 12288, 24576, 49152),
    )
    budgets: Annotated[tuple[int, ...], "budgets, along k, for rules with one"] = (
        *(8, 16, 32, 64, 128, 256),
    )
    width: Annotated[int, "width of the rows"] = 768
    batch: Annotated[int, "rows in a batch, along F and k"] = 1024
    n_features: Annotated[int, "size of the dictionary, along B and k"] = 12288
    k: Annotated[int, "budget, along B and F"] = 32
    rounds: Annotated[int, "how often each is timed, at most"] = 5
    seconds: Annotated[float, "no new round of a point after these, and 3 rounds"] = 10

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        small = [
            name
            for name in ("batches", "features", "width", "batch", "n_features")
            if np.min(getattr(self, name), initial=1) < 1
        ]
        yield from (f"{name} must be at least 1" for name in small)
        if self.rounds < 1:
            yield "rounds: nothing would be timed"
        if not self.rules:
            yield "rules: nothing would be timed"
        if small or not self.rules:
            return
        try:
            found = cases(self)
        except ValueError as error:
            yield from (f"rules: {line}" for line in str(error).splitlines())
            return
        if not found:
            yield "rules: nothing would be timed"
        names = [registry.parse_spec(spec)[0] for spec in self.rules]
        if len(set(names)) < len(names):
            yield "rules: each can be given once; a curve has the name of its rule"

    @property
    def middle(self) -> dict[str, int]:
        """Where each size stays while another changes."""
        return {"B": self.batch, "F": self.n_features, "k": self.k}


def cases(config: Config) -> list[bench.Case]:
    """All points of all axes, each once, and those of one size after another."""
    sizes = [(B, config.n_features) for B in config.batches]
    sizes += [(config.batch, F) for F in config.features]
    found = bench.cases(as_bench(config, sizes, (config.k,)))
    middle = [(config.batch, config.n_features)]
    along_k = bench.cases(as_bench(config, middle, config.budgets))
    found += [case for case in along_k if case.k is not None]
    return sorted(dict.fromkeys(found), key=lambda case: case.size)


def as_bench(
    config: Config, sizes: Sequence[tuple[int, int]] = (), ks: tuple[int, ...] = ()
) -> bench.Config:
    """The settings of `bench` that time ours alone at these sizes `(B, F)`."""
    return bench.Config(
        sizes=tuple(f"{B}x{config.width}x{F}" for B, F in sizes),
        ks=ks,
        rules=config.rules,
        peers=(),
        rounds=config.rounds,
        seconds=config.seconds,
        rows_at_once=0,
    )


def run(config: Config) -> dict[str, Any]:
    """Times all points; prints each, then the slopes, and stores them with a figure."""
    plain = as_bench(config)
    points: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "settings": asdict(config),
        "machine": bench.machine(plain),
        "versions": {},
        "points": points,
        "slopes": [],
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for case, timed in bench.each(cases(config), plain, {}):
        points.append(point(case.columns, timed))
        report["slopes"] = _growth.slopes(points, config.middle)
        report["versions"] |= timed.versions
        report["machine"]["device"] = timed.device
        write_whole(out / "bench_growth.json", json.dumps(report, indent=1) + "\n")
        ms, ratio = points[-1]["ms"], points[-1]["ratio"]
        print(f"{case.text}: {ms:.1f} ms, {ratio:.2f} x the product", flush=True)
    print(_growth.table(report["slopes"]))
    _growth.draw(report, config.middle, out / "bench_growth.png")
    return report


def point(columns: Mapping[str, Any], timed: Timed) -> dict[str, Any]:
    """What is reported of one pair."""
    ours, floor = timed.seconds[OURS], timed.seconds[FLOOR]
    return {
        **columns,
        "ms": 1e3 * statistics.median(ours),
        "ms_min": 1e3 * min(ours),
        "ms_max": 1e3 * max(ours),
        "floor_ms": 1e3 * statistics.median(floor),
        "ratio": _bench_timing.within_rounds(ours, floor),
    }
