"""Times SAEs that are trained side by side: what that costs, and what it saves.

Steps alone, on rows that are sums of known directions: one step of all SAEs against as
many steps of one SAE that has the machine for itself. All are computed at once, by
`jax.vmap`, or one at a time, which is what a CPU does by default. These take turns in
one process.

Tokens, on the embedded language model: one process that trains all SAEs on one pass of
the model against a process for each SAE, all at work at the same time on the same
cores. Model, text, stream and SAEs are those of `frontier`. A turn is one block of the
stream, which is read and trained on; it ends with the last of the processes. Start-up,
compilation and a first block come before, for all of them: nothing is timed until all
are ready.

Command:  python launch.py --experiment=bench_ensemble
Hardware: 2 CPU cores with nothing else on them, twenty minutes, 8 GB. On a GPU with
          XLA_PYTHON_CLIENT_PREALLOCATE=false, since processes share its memory.
Leaves:   out/bench_ensemble.json (the rows), bench_ensemble.txt (the table)

Columns of a row: rule; measured, steps or tokens; n SAEs; how they are trained; B rows
in a batch; D their width; F features; ms, ms_min, ms_max: median, least and most of one
step of all n, with its part of the reading where tokens are measured; throughput:
against the first of the same rule and measure, alone or processes, the median within
rounds; compile_s: seconds of compiling, for steps; tokens_per_s to n trained SAEs and
peak_mb, the memory of all processes at the highest point of their turns, in 10^6 bytes,
for tokens.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from experiments import _bench_data, _bench_timing, _bench_turns, bench, frontier
from experiments._bench_steps import Steps
from experiments._bench_turns import Turns, started, taken, until_the_last
from sae_jax import SAE
from sae_jax.config import Data, Dictionary
from sae_jax.run.groups import Groups, grouped
from sae_jax.run.members import Member
from sae_jax.settings import Spec
from sae_jax.training.recipe import Recipe
from sae_jax.whole_files import write_whole

ALONE, PROCESSES, TOGETHER = "alone", "processes", "side by side"
PROCESS = "experiments._bench_ensemble_process"
RECIPE = Recipe(steps=10**9, lr=3e-4)


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/bench_ensemble"
    rules: Annotated[tuple[Spec, ...], "rules to time, one after another"] = (
        Spec("topk(k=32)"),
        Spec("batch_topk(k=32)"),
        Spec("top_afa(coef=0.03125)"),
        Spec("relu(coef=0.05)"),
        Spec("matryoshka(k=32)"),
        Spec("gated"),
    )
    seeds: Annotated[tuple[int, ...], "seeds, by commas; as many SAEs are trained"] = (
        *range(8),
    )
    batch: Annotated[int, "rows per step"] = 1024
    width: Annotated[int, "width of the rows, for steps alone"] = 128
    n_features: Annotated[int, "features of each SAE"] = 2048
    steps: Annotated[int, "steps of all SAEs in a turn, for steps alone"] = 4
    site: Annotated[str, "what is read of the language model: place.layer"] = (
        "resid_post.2"
    )
    buffer: Annotated[int, "tokens that are read, and trained on, in a turn"] = 8192
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16
    rounds: Annotated[int, "how often each takes a turn"] = 5

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        sizes = ("batch", "width", "n_features", "steps", "rounds")
        small = [name for name in sizes if getattr(self, name) < 1]
        yield from (f"{name} must be at least 1" for name in small)
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            yield "seeds: give two or more, each once"
        if not self.rules:
            yield "rules: nothing would be timed"
        if small or not self.rules:
            return
        try:
            for rule in self.rules:
                SAE(self.width, self.n_features, rule)
        except ValueError as error:
            yield from (f"rules: {line}" for line in str(error).splitlines())
            return
        try:
            found = as_frontier(self)
        except ValueError as error:
            yield from str(error).splitlines()
        else:
            yield from found.faults()


def as_frontier(config: Config) -> frontier.Config:
    """The settings of `frontier` that train these SAEs on the language model."""
    return frontier.Config(
        rules=config.rules,
        factors=(1.0,),
        seeds=config.seeds,
        site=config.site,
        sae=Dictionary(n_features=config.n_features, treatment="scale"),
        data=Data(
            batch=config.batch,
            buffer=config.buffer,
            contexts_per_pass=config.contexts_per_pass,
        ),
    )


def run(config: Config) -> list[dict[str, Any]]:
    """Times all rules; prints and stores the table as it goes."""
    machine = bench.machine(bench.Config())
    machine["device"] = jax.devices()[0].device_kind
    lines: list[str] = []
    found: list[dict[str, Any]] = []
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    def say(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)
        write_whole(out / "bench_ensemble.txt", "\n".join(lines) + "\n")

    say(
        f"{_bench_timing.where(machine)}, jax {jax.__version__}",
        _bench_timing.line({n: n for n in _bench_turns.COLUMNS}, _bench_turns.COLUMNS),
    )
    for measure in (steps_alone, with_the_model):
        for rule in config.rules:
            one = dataclasses.replace(config, rules=(rule,))
            columns = {"rule": rule, "n": len(one.seeds), "F": one.n_features}
            rows = _bench_turns.rows(columns, measure(one))
            found += rows
            write_whole(out / "bench_ensemble.json", json.dumps(found, indent=1) + "\n")
            say(*(_bench_timing.line(row, _bench_turns.COLUMNS) for row in rows))
    return found


def steps_alone(config: Config) -> Turns:
    """Of the first rule: all SAEs, and one that takes as many steps by itself."""
    sae = SAE(config.width, config.n_features, config.rules[0])
    members = {f"{seed}": Member(sae, "x", seed=seed) for seed in config.seeds}
    [group] = grouped(members, RECIPE)
    n = len(members)
    kinds = {ALONE: grouped(dict(itertools.islice(members.items(), 1)), RECIPE)}
    for k in (1, n):
        ensemble = dataclasses.replace(group.ensemble, at_once=k)
        kinds[f"{k} at once"] = Groups([group._replace(ensemble=ensemble)])
    x = _bench_data.planted(
        0, _bench_data.N_BATCHES * config.batch, config.width, config.n_features
    )
    batches = [
        {"x": jax.numpy.asarray(rows)} for rows in np.split(x, _bench_data.N_BATCHES)
    ]
    with compiled_anew():
        systems = {
            kind: Steps(groups, itertools.cycle(batches))
            for kind, groups in kinds.items()
        }
    for steps in systems.values():
        steps(1)
    turns = {
        kind: partial(steps, config.steps * (n if kind == ALONE else 1))
        for kind, steps in systems.items()
    }
    seconds = taken(turns, config.rounds)
    compiled = {kind: steps.compile_s for kind, steps in systems.items()}
    size = config.batch, config.width, config.steps
    return Turns("steps", *size, seconds, compile_s=compiled)


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Inside, programs are compiled, though `launch.py` has kept those of before."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # which JAX has opened, and would go on using
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def with_the_model(config: Config) -> Turns:
    """Of the first rule: a process for each SAE, and one process for all."""
    alone = [dataclasses.replace(config, seeds=(seed,)) for seed in config.seeds]
    with ExitStack() as stack:
        workers = {
            PROCESSES: started(stack, PROCESS, alone),
            TOGETHER: started(stack, PROCESS, [config]),
        }
        systems = {
            name: partial(until_the_last, those) for name, those in workers.items()
        }
        seconds = taken(systems, config.rounds)
    peak_mb = {n: sum(w.peak_mb for w in those) for n, those in workers.items()}
    width = workers[TOGETHER][0].hello["width"]
    size = config.batch, width, config.buffer // config.batch
    return Turns("tokens", *size, seconds, peak_mb=peak_mb)
