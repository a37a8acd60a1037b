"""Times tokens to trained SAE, end to end: ours beside SAELens.

GPT-2-small's shape with random weights and random tokens; TopK on the residual stream
before the middle layer. A round is one fill of the shuffle buffer and all steps that
its rows allow: tokens are read, the language model runs up to the layer, rows are
mixed, the SAE takes its steps. Both systems use their own classes for all of it, work
on as many tokens as the other, and take turns, so that a busy machine hurts both alike.
Reading activations alone is what `bench_lm` times, steps alone what `bench` times.

Command:  make bench      (builds .venv-saelens first)
Hardware: 2 CPU cores, five minutes; the README has the figures.
Leaves:   out/bench_train.json

Columns of a row: system; tokens_per_s: of the median round; seconds, seconds_min,
seconds_max: of a round; ratio_to_ours: their seconds over ours, median within rounds.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from experiments._bench_steps import Steps
from experiments._bench_workers import Worker
from sae_jax import SAE, checks
from sae_jax.activations import Harvester, OnTheFly
from sae_jax.run.groups import grouped
from sae_jax.run.members import Member
from sae_jax.text.contexts import Packing
from sae_jax.text.documents import Rows
from sae_jax.training.recipe import Recipe
from sae_jax.whole_files import write_whole

OURS, PEER = "sae_jax", "SAELens"


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/bench_train"
    saelens_python: Annotated[
        str, "interpreter that has sae_lens; empty: ours is timed alone"
    ] = ".venv-saelens/bin/python"
    layers: Annotated[int, "layers of the language model"] = 12
    width: Annotated[int, "width of its residual stream"] = 768
    heads: Annotated[int, "its attention heads"] = 12
    vocab_size: Annotated[int, "tokens in its vocabulary"] = 50_257
    layer: Annotated[int, "the SAE reads resid_pre of this layer"] = 6
    context: Annotated[int, "tokens per context"] = 128
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16
    buffer: Annotated[int, "rows that are read, and trained on, per round"] = 16_384
    batch: Annotated[int, "rows per training step"] = 4096
    n_features: Annotated[int, "features of the SAE"] = 12_288
    k: Annotated[int, "active features per row"] = 32
    rounds: Annotated[int, "how often each is timed"] = 3

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        for name in ("batch", "context", "contexts_per_pass", "rounds", "layer"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1"
                return
        per_pass = self.context * self.contexts_per_pass
        if self.buffer < 1 or self.buffer % (2 * self.batch) or self.buffer % per_pass:
            yield (
                f"buffer={self.buffer} must be a multiple of two batches, "
                f"{2 * self.batch}, and of a pass of the model, {per_pass}"
            )
        python = self.saelens_python
        if python and not Path(python).exists():
            yield (
                f"saelens_python={python!r} does not exist; `make bench` builds it, "
                f"and --saelens_python= times ours alone"
            )


def run(config: Config) -> list[dict[str, Any]]:
    """Runs both in turn; prints and stores the table."""
    checks.raise_all(config.faults())
    times: dict[str, list[float]] = {}
    versions = {"jax": jax.__version__}
    with ExitStack() as stack:
        rounds: dict[str, Callable[[], float]] = {OURS: ours(config)}
        if config.saelens_python:
            peer = stack.enter_context(saelens(config))
            rounds[PEER] = peer.step
            versions |= peer.hello["versions"]
        for i in range(config.rounds):
            for name in list(rounds)[:: 1 - i % 2 * 2]:  # another first each time
                times.setdefault(name, []).append(rounds[name]())
    rows = [row(config, name, times) for name in rounds]
    report = {
        "config": asdict(config),
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "rows": rows,
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "bench_train.json", json.dumps(report, indent=1) + "\n")
    print(f"{'':10} {'tokens/s':>9} {'s a round':>10} {'x ours':>7}")
    for r in rows:
        print(
            f"{r['system']:10} {r['tokens_per_s']:9,.0f} {r['seconds']:10.1f} "
            f"{r['ratio_to_ours']:7.2f}"
        )
    return rows


def row(config: Config, name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """What is reported of one system."""
    median = statistics.median(times[name])
    ratios = [t / o for t, o in zip(times[name], times[OURS], strict=True)]
    return {
        "system": name,
        "tokens_per_s": config.buffer / median,
        "seconds": median,
        "seconds_min": min(times[name]),
        "seconds_max": max(times[name]),
        "ratio_to_ours": statistics.median(ratios),
    }


def saelens(config: Config) -> Worker:
    """The other system, in a process and an environment of its own."""
    # Links are left alone: by its link Python finds its environment.
    python = str(Path(config.saelens_python).absolute())
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return Worker(python, ["experiments._bench_train_saelens"], config, offline)


def ours(config: Config) -> Callable[[], float]:
    """The seconds of one round, after a first one: what an experiment does in its loop.

    A group of the stream is one round; see `sae_jax.activations.on_the_fly`.
    """
    site = f"resid_pre.{config.layer}"
    stream = open_stream(config, site)
    sae = SAE(config.width, config.n_features, f"topk(k={config.k})")
    recipe = Recipe(steps=10**9, lr=3e-4)
    steps = Steps(grouped({OURS: Member(sae, site)}, recipe), stream.batches())
    per_round = config.buffer // config.batch
    steps(per_round)
    return lambda: steps(per_round)


def open_stream(config: Config, site: str) -> OnTheFly:
    """Activations of random tokens; each context is a document with its BOS."""
    import datasets
    from transformers import GPT2Config

    from sae_jax.lm.flax_lm import FlaxLM

    lm = FlaxLM.random(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
        )
    )
    shape = (config.buffer // config.context, config.context)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, shape)
    tokens[:, 0] = 0
    text = datasets.Dataset.from_dict({"tokens": tokens}).to_iterable_dataset()
    return OnTheFly(
        Harvester(lm, (site,), config.contexts_per_pass),
        Rows("random tokens", text, "tokens", "all"),
        Tokenizer(),
        Packing(config.context, use_bos=True),
        batch=config.batch,
        buffer=config.buffer,
    )


class Tokenizer:
    """Says which token begins a document; there is no text to cut."""

    bos_token_id = 0
