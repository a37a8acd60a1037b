"""The batches of a training run, as its settings ask for them; not an experiment."""

from collections.abc import Iterator
from typing import Any

from sae_jax.activations import FromShards, Harvester, OnTheFly, Shards
from sae_jax.lm.sites import gradient_of
from sae_jax.share import Share


def names(config: Any) -> tuple[str, ...]:
    """The arrays of a batch: sites, and the gradients that rules need."""
    return (*config.read_sites(), *map(gradient_of, config.graded_sites()))


def widths(config: Any, lm: Any) -> dict[str, int]:
    """The widths of these arrays, before there is a stream."""
    found = {site: lm.width(site) for site in config.read_sites()}
    return found | {gradient_of(s): found[s] for s in config.graded_sites()}


def open_stream(
    config: Any, lm: Any, tokenizer: Any, share: Share
) -> FromShards | OnTheFly:
    """The batches, or a process's share of them."""
    data = config.data
    if data.shards:
        shards = Shards(data.shards)
        if shards.made_by["weights"] != lm.fingerprint:
            raise ValueError(
                f"{data.shards} holds activations of lm={shards.made_by['lm']!r}, "
                f"whose weights are not those of lm={config.lm!r}"
            )
        return FromShards(
            shards, batch=data.batch, sites=names(config), seed=data.seed, share=share
        )
    return OnTheFly(
        Harvester(
            lm,
            config.read_sites(),
            data.contexts_per_pass,
            gradients=config.graded_sites(),
        ),
        config.open_documents(),
        tokenizer,
        config.packing(repeat=True),
        batch=data.batch,
        buffer=data.buffer,
        seed=data.seed,
        readers=data.readers,
        share=share,
        mixing=data.mixing,
    )


def shard_faults(config: Any) -> Iterator[str]:
    """What is wrong with harvested activations, and where they overlap."""
    text, folder = config.text(), config.data.shards
    if folder:
        try:
            shards = Shards(folder, verify=False)
            sites = config.read_sites()
            FromShards(shards, batch=config.data.batch, sites=sites)
            text = shards.made_by["text"]
            bare = [
                s for s in config.graded_sites() if gradient_of(s) not in shards.widths
            ]
            if bare:
                yield (
                    f"data.shards: {folder} holds no gradients of the model's loss at "
                    f"{', '.join(bare)}, which a rule needs. Harvest into another "
                    f"folder, with them: python launch.py --experiment=harvest "
                    f"--gradients=true --sites={','.join(sites)} --out=FOLDER"
                )
        except ValueError as error:
            yield f"data.shards: {error}"
    if config.evaluation.overlaps(text):
        yield (
            f"evaluation.part={config.evaluation.part!r} is trained on as well "
            f"(part={text['part']!r}); evaluate on another part or dataset"
        )
