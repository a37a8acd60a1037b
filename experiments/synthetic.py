"""Every rule on data whose features are known, at the sparsity of the truth.

Worlds of planted features (`_worlds`): equal and Zipf frequencies, correlated groups,
parents with children, noise. Each registered rule, yours in `rule_files` too, is
trained on each of them, and what it learned is compared with what was planted
(`_recovery`). A rule with a budget gets the true mean L0; the knob of another is
steered there during training, and if that misses by more than `tolerance`, searched; a
rule that nothing can steer is trained as it is given. Whatever ends farther off than
`tolerance` says so, and has a star in the tables.

Command:  python launch.py --experiment=synthetic
Example:  python launch.py --experiment=synthetic --rule_files=my_rule.py
          --rules="my_rule(a=3),topk" --worlds=zipf,hierarchical
Leaves:   out/synthetic.json (a row for each rule, world and seed), synthetic.txt,
          synthetic.md, synthetic.png
Hardware: 2 CPU cores; of each SAE some six seconds of processor time, ten minutes for
          seven rules, compilation included.
Expected: over three seeds, matched cosines of .92 (topk), .91 (gated), .90 (relu), .85
          (batch_topk), .84 (jump_relu) and .76 (matryoshka) in the world `equal`,
          between .70 and .80 in `hierarchical`; of top_afa, which nothing steers and
          which keeps 27 to 46 features, .45 to .47.

The same command goes on with SAEs that are missing; rules, worlds and seeds may be
others then, and are added.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from experiments import _matched, _recovery_figure, _recovery_table, _worlds
from experiments._worlds import Planted
from sae_jax.run.folder import RunFolder, folder_fault
from sae_jax.run.log import plain
from sae_jax.settings import Spec, to_dict
from sae_jax.training.knob import Knob
from sae_jax.training.recipe import Recipe
from sae_jax.whole_files import write_whole

WorldName = Literal["equal", "zipf", "correlated", "hierarchical", "noisy"]
RESULTS = "synthetic.json"
Row = dict[str, Any]


class Cell(NamedTuple):
    """One SAE that is wanted; `given` is its rule as the settings have it."""

    world: str
    given: str
    seed: int


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/synthetic"
    rules: Annotated[
        tuple[Spec, ...], "rules to train; none given: all that are registered"
    ] = ()
    rule_files: Annotated[
        tuple[str, ...], "Python files with rules of your own, by commas"
    ] = ()
    worlds: Annotated[tuple[WorldName, ...], "which worlds"] = (
        "equal",
        "zipf",
        "correlated",
        "hierarchical",
        "noisy",
    )
    seeds: Annotated[tuple[int, ...], "seeds of directions, rows and SAEs"] = (0, 1, 2)
    n_features: Annotated[int, "features of an SAE"] = 64
    batch: Annotated[int, "rows of a step"] = 256
    held_out: Annotated[int, "rows to evaluate on"] = 8192
    tolerance: Annotated[
        float,
        "how far L0 may be from the true one, relative to it, to count as matched",
    ] = 0.1
    tries: Annotated[
        int, "trainings with a constant knob, at most, where steering ends farther off"
    ] = 4
    planted: Planted = Planted()
    # Knob.rate was chosen on the world `equal`: faster control overshoots more.
    train: Recipe = Recipe(
        steps=3000, lr=2e-3, warmup=150, decay="cosine", knob=Knob(rate=0.005)
    )

    def specs(self) -> tuple[str, ...]:
        """The rules that are asked for."""
        return self.rules or _matched.all_rules()

    def plan(self, spec: str) -> _matched.Plan:
        """How a rule is trained."""
        planted = self.planted
        return _matched.plan(
            spec, planted.width, self.n_features, planted.l0, self.train
        )

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        for name in ("batch", "held_out", "n_features"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        for name in ("tolerance", "tries"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must not be negative."
        for name in ("seeds", "worlds"):
            given = getattr(self, name)
            if not given:
                yield f"{name}: nothing would be trained."
            if len({*given}) < len(given):
                yield f"{name}: give each once."
        if len({*self.rules}) < len(self.rules):
            yield "rules: give each once."
        if self.train.knob.target_l0 is not None:
            yield "train.knob.target_l0 is the planted l0 here; leave it out."
        if self.batch > 0:
            yield from self.train.faults(self.batch)
        wrong = [f"planted.{fault}" for fault in self.planted.faults()]
        yield from wrong or self.misfits()

    def misfits(self) -> Iterator[str]:
        """Worlds that cannot be, and SAEs that cannot be trained on them."""
        for name in self.worlds:
            for fault in _worlds.faults(name, self.planted):
                yield f"planted.{fault}"
        if self.n_features < 1:
            return
        for spec in self.specs():
            try:
                self.plan(spec)
            except ValueError as error:
                yield from (f"rules: {line}" for line in str(error).splitlines())

    def conflicts(self) -> list[str]:
        """What is asked for once nothing else is wrong."""
        fault = folder_fault(self.out, self.identity())
        return [f"out: {fault}"] if fault else []

    def identity(self) -> dict[str, Any]:
        """What has to stay for results of several runs to stand in one table."""
        beside = {"out", "rules", "worlds", "seeds"}
        values = {n: v for n, v in to_dict(self).items() if n not in beside}
        files = [Path(file).read_bytes() for file in self.rule_files]
        values["rule_files"] = [hashlib.sha256(file).hexdigest() for file in files]
        return values

    def cells(self) -> list[Cell]:
        """All that is to be trained; every rule and world before the second seed."""
        return [
            Cell(world, spec, seed)
            for seed in self.seeds
            for world in self.worlds
            for spec in self.specs()
        ]

    def estimates(self) -> dict[str, str]:
        """What a dry run says of size."""
        n, steps = len(self.cells()), self.train.steps
        hows = [self.plan(spec).how for spec in self.specs()]
        counted = ", ".join(f"{hows.count(how)} {how}" for how in dict.fromkeys(hows))
        return {
            "SAEs": f"{n} ({len(hows)} rules, {len(self.worlds)} worlds, "
            f"{len(self.seeds)} seeds), {self.n_features:,} features of width "
            f"{self.planted.width:,}",
            "sparsity of the rules": counted,
            "rows": f"{steps * self.batch:,} for each ({steps:,} steps of "
            f"{self.batch:,}), {n * steps:,} steps in all",
        }


def run(config: Config) -> list[Row]:
    """Trains what is missing; prints as it goes, stores each SAE's row at once."""
    folder = RunFolder(config.out, config.identity())
    try:
        rows = finished(folder / RESULTS)
        done = {Cell(row["world"], row["given"], row["seed"]) for row in rows}
        missing = [cell for cell in config.cells() if cell not in done]
        for i, cell in enumerate(missing, 1):
            began = time.perf_counter()
            rows.append(row_of(config, cell))
            write_whole(folder / RESULTS, json.dumps(rows, indent=1) + "\n")
            seconds = time.perf_counter() - began
            print(f"{i}/{len(missing)}  {seconds:5.1f} s  {said(rows[-1])}", flush=True)
        text = _recovery_table.table(rows)
        print(f"\n{text}")
        write_whole(folder / "synthetic.txt", text + "\n")
        write_whole(folder / "synthetic.md", _recovery_table.markdown(rows) + "\n")
        _recovery_figure.draw(rows, folder / "synthetic.png")
    finally:
        folder.close()
    return rows


def finished(path: Path) -> list[Row]:
    """The rows of before."""
    return json.loads(path.read_text()) if path.exists() else []


def row_of(config: Config, cell: Cell) -> Row:
    """Trains one SAE and compares it with the truth."""
    plan, keys = config.plan(cell.given), _matched.keys(cell.seed)
    world = _worlds.make(cell.world, config.planted, keys.world)
    rows = _matched.held_out(world, keys, config.held_out)
    near = config.tolerance
    scores = _matched.best(
        plan, world, keys, config.batch, rows, near=near, tries=config.tries
    )
    return {
        "world": cell.world,
        "rule": plan.sae.bound.rule.name,
        "given": cell.given,
        "seed": cell.seed,
        "matched": _matched.distance(scores) <= near,
        **{name: plain(value) for name, value in scores.items()},
    }


def said(row: Row) -> str:
    """One SAE in a line."""
    more = ""
    if row["diverged_in_step"] is not None:
        more = f"  diverged in step {row['diverged_in_step']}"
    return (
        f"{row['world']:12} {row['spec']}  seed {row['seed']}: L0 {row['l0']:.2f} of "
        f"{row['true_l0']:.2f}, matched cosine {row['matched_cosine']:.3f}, "
        f"F1 {row['f1']:.3f}{more}"
    )
