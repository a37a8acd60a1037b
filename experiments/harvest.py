"""Writes a language model's activations to disk, for training many SAEs on them.

Several sites in one pass of the model; resumable: the same command goes on where a
killed run stopped. Training then reads the shards in one shuffle over all rows.

Command:  python launch.py --experiment=harvest --out=runs/activations --rows=1000000
Example:  python launch.py --experiment=harvest --lm=gpt2 --sites=resid_pre.8,mlp_out.8
          --dataset=Skylion007/openwebtext --rows=10000000 --out=/data/gpt2
          (--gradients=true: for rules that look at the gradient of the model's loss)
Leaves:   out/shard-*.safetensors and out/manifest.json
Expected: about 21,000 rows per second on 2 CPU cores (embedded model, resid_post.2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from sae_jax.activations import Harvester, harvest
from sae_jax.config import ModelConfig, TextConfig


@dataclass
class Config(ModelConfig, TextConfig):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/activations"
    sites: Annotated[
        tuple[str, ...], "sites to read, by commas: place.layer, as in resid_post.2"
    ] = ("resid_post.2",)
    gradients: Annotated[
        bool, "whether the gradients of the model's loss at the sites come along"
    ] = False
    rows: Annotated[int, "how many positions to harvest"] = 1_000_000
    rows_per_shard: Annotated[int, "positions per file, and at most in memory"] = 65_536
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16
    dtype: Annotated[
        Literal["bfloat16", "float32"], "the type in which activations are stored"
    ] = "bfloat16"

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        yield from self.text_faults()
        yield from self.model_faults(self.sites, self.context)
        if not self.sites:
            yield "sites: none is asked for"
        for name in ("rows", "rows_per_shard", "contexts_per_pass"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1"

    def estimates(self) -> dict[str, str]:
        """What a dry run says of size."""
        lm = self.outline() or self.open_lm()
        wide = sum(lm.width(site) for site in self.sites) * (1 + self.gradients)
        size = 2 if self.dtype == "bfloat16" else 4
        beside = " with their gradients" if self.gradients else ""
        return {
            "rows": f"{self.rows:,} of {len(self.sites)} sites{beside}, {wide} wide in "
            f"all",
            "disk": f"{self.rows * (wide * size + 16) / 1e9:.2g} GB",
            "memory": f"{self.rows_per_shard * wide * size / 1e9:.2g} GB for a shard",
        }


def run(config: Config) -> None:
    """Harvests, or goes on with a harvest."""
    documents = config.open_documents()
    tokenizer = config.open_tokenizer()
    lm = config.open_lm()
    manifest = harvest(
        config.out,
        Harvester(
            lm,
            config.sites,
            config.contexts_per_pass,
            config.dtype,
            gradients=config.sites if config.gradients else (),
        ),
        documents,
        tokenizer,
        config.packing(repeat=False),
        rows=config.rows,
        rows_per_shard=config.rows_per_shard,
        text=config.text(),
    )
    rows = sum(entry.rows for entry in manifest["shards"])
    size = sum(entry.bytes for entry in manifest["shards"])
    print(
        f"{config.out}: {rows} rows of {', '.join(config.sites)} "
        f"in {len(manifest['shards'])} shards, {size / 1e6:.1f} MB"
    )
