"""Times the reading of activations: ours beside TransformerLens and PyTorch.

GPT-2-small's shape with random weights, the residual stream before one layer, one pass
over a batch of contexts. All are run in turn in one session, on the same cores, and the
floor is the matrix products of the needed layers alone. Reported are medians over
rounds, and ratios to ours within a round, so that a busy machine hurts all alike.

Command:  make bench-lm      (builds .venv-peers with CPU torch and transformer_lens)
Hardware: 2 CPU cores, about five minutes; the README has the figures.
Leaves:   out/bench_lm.json
"""

import json
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/bench_lm"
    peer_python: Annotated[str, "interpreter that has torch and transformer_lens"] = (
        ".venv-peers/bin/python"
    )
    layer: Annotated[int, "read resid_pre of this layer"] = 8
    layers: Annotated[int, "layers of the whole model"] = 12
    width: Annotated[int, "width of the residual stream"] = 768
    heads: Annotated[int, "attention heads"] = 12
    vocab_size: Annotated[int, "tokens in the vocabulary"] = 50_257
    batch: Annotated[int, "contexts per pass"] = 8
    context: Annotated[int, "tokens per context"] = 128
    rounds: Annotated[int, "how often each is run"] = 15


def run(config: Config) -> list[dict]:
    """Runs all in turn; prints and stores the table."""
    if not Path(config.peer_python).exists():
        raise FileNotFoundError(
            f"peer_python={config.peer_python!r} does not exist; `make bench-lm` "
            f"builds it"
        )
    runners = {"sae_jax": ours(config), "matmul floor": floor(config)}
    peers = Peers(config)
    order = [*runners, *peers.names]
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(config.rounds):
        for name in order:
            seconds = runners[name]() if name in runners else peers.run(name)
            times[name].append(seconds * 1e3)
    peers.close()
    positions = config.batch * config.context
    rows = []
    for name in order:
        ratios = [t / o for t, o in zip(times[name], times["sae_jax"], strict=True)]
        median = statistics.median(times[name])
        rows.append(
            {
                "runner": name,
                "ms": round(median, 1),
                "ms_min": round(min(times[name]), 1),
                "ms_max": round(max(times[name]), 1),
                "positions_per_s": round(positions / median * 1e3),
                "ratio_to_ours": round(statistics.median(ratios), 3),
            }
        )
    report = {
        "config": asdict(config),
        "versions": {"jax": jax.__version__, **peers.versions},
        "device": jax.devices()[0].device_kind,
        "rows": rows,
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench_lm.json").write_text(json.dumps(report, indent=1))
    for row in rows:
        print(
            f"{row['runner']:34} {row['ms']:8.1f} ms  ({row['ms_min']:.1f} to "
            f"{row['ms_max']:.1f})  {row['positions_per_s']:7d} positions/s  "
            f"{row['ratio_to_ours']:.2f} x ours"
        )
    return rows


def ours(config: Config):
    """One pass of the Flax source."""
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
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (config.batch, config.context), dtype=np.int32
    )
    site = f"resid_pre.{config.layer}"
    return timed(lambda: lm.run(tokens, read=(site,)).values[site])


def floor(config: Config):
    """The four matrix products of each needed layer, and nothing else."""
    n, d = config.batch * config.context, config.width
    sizes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    weights = [jax.random.normal(k, s) for k, s in zip(keys, sizes, strict=True)]
    inputs = {w.shape[0]: jnp.ones((n, w.shape[0])) for w in weights}

    @jax.jit
    def layer(inputs, weights):
        return [inputs[w.shape[0]] @ w for w in weights]

    def all_layers():
        return [layer(inputs, weights) for _ in range(config.layer)]

    return timed(all_layers)


def timed(fn):
    """The seconds of one call, after one that compiles."""
    jax.block_until_ready(fn())

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(fn())
        return time.perf_counter() - start

    return once


class Peers:
    """The peers' process, asked for one run at a time over a pipe."""

    def __init__(self, config: Config):
        script = Path(__file__).with_name("_bench_lm_peers.py")
        self._process = subprocess.Popen(
            [config.peer_python, str(script), json.dumps(asdict(config))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._read()
        self.names, self.versions = hello["names"], hello["versions"]

    def run(self, name: str) -> float:
        """The seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(name) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the peers' process ended; its error is above")
