"""What experiments on finished SAEs share: which, of which model, on which text."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from sae_jax.config import ModelConfig, TextConfig
from sae_jax.evaluation import Evaluator, HeldOut
from sae_jax.exchange import load, place
from sae_jax.run.folder import CONFIG
from sae_jax.text.documents import Part
from sae_jax.trained import TrainedSAE


@dataclass
class Finished(ModelConfig, TextConfig):
    """Which SAEs, and on which text they are looked at."""

    sae: Annotated[
        tuple[str, ...],
        "folders or files of finished SAEs, by commas, also of other libraries and on "
        "the Hugging Face hub; the folder of a run stands for all of its SAEs",
    ] = ()
    rule_files: Annotated[
        tuple[str, ...], "Python files with their rules, if they are of your own"
    ] = ()
    site: Annotated[str, "what they read; empty: what each was trained on"] = ""
    out: Annotated[str, "folder to write to"] = "runs/finished"
    part: Annotated[Part, "which documents to look at, by a hash of names"] = "heldout"
    contexts: Annotated[int, "how many contexts of them"] = 128
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if not self.sae:
            yield "sae is empty; give the folders of one or more saved SAEs"
        if self.contexts < 1 or self.contexts_per_pass < 1:
            yield "contexts and contexts_per_pass must be at least 1"
        if (Path(self.out).expanduser() / CONFIG).exists():
            yield f"out={self.out!r} holds a training run; give a folder of its own"
        yield from self.text_faults()
        saes: dict[str, TrainedSAE] = {}
        try:
            saes = opened(self.sae)
        except ValueError as error:
            yield from str(error).split("\n")
        sites = [self.sites(one) for one in saes.values()]
        if any(site is None for site, _ in sites):
            yield "site: an SAE does not say what it was trained on; give --site"
            return
        read = tuple({s for pair in sites for s in pair if s is not None})
        faults = self.model_faults(read, self.context)
        yield from faults
        lm = None if faults else self.outline()
        for name, one in saes.items() if lm else ():
            ends = zip(self.sites(one), (one.sae.d_in, one.sae.width_out), strict=True)
            for site, width in ends:
                if site is not None and lm.width(site) != width:
                    yield (
                        f"{name} is made for a width of {width}, and {site} of "
                        f"lm={self.lm!r} is {lm.width(site)} wide"
                    )

    def sites(self, one: TrainedSAE) -> tuple[str | None, str | None]:
        """What an SAE reads, and what it aims at if it is a transcoder."""
        site = self.site or one.about.get("site")
        return site, one.about.get("target") if one.sae.is_transcoder else None


@cache
def opened(folders: tuple[str, ...]) -> dict[str, TrainedSAE]:
    """The SAEs by name: the end of their folders, as much as tells them apart."""
    paths: list[Path] = []
    for given in folders:
        path = Path(given).expanduser().resolve()
        if not path.exists():  # a name on the hub; the fault if it is none
            where = place(given)
            path = where.folder
            if len(where.given) == 1:
                path = path / next(iter(where.given))
        paths += sorted((path / "saes").glob("*")) or [path]
    if len(set(paths)) < len(paths):
        raise ValueError(f"sae={','.join(folders)} names a folder twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path.parts[-depth:]): load(path) for path in paths}


class Reading(NamedTuple):
    """SAEs whose `about` says where they read, a model with text, and its tokenizer."""

    saes: dict[str, TrainedSAE]
    evaluator: Evaluator
    tokenizer: Any


def read(config: Finished) -> Reading:
    """Opens all that is looked at."""
    saes = opened(config.sae)
    tokenizer, lm = config.open_tokenizer(), config.open_lm()
    for name, one in saes.items():
        weights = one.about.get("lm_weights")
        if weights not in (None, lm.fingerprint):
            raise ValueError(
                f"{name} was trained on lm={one.about.get('lm')!r}, whose weights are "
                f"not those of lm={config.lm!r}; give that model"
            )
    heldout = HeldOut.read(
        config.open_documents(),
        tokenizer,
        config.packing(repeat=False),
        config.contexts,
    )
    evaluator = Evaluator(lm, heldout, contexts_per_pass=config.contexts_per_pass)
    known = {}
    for name, one in saes.items():
        site, target = config.sites(one)
        known[name] = replace(one, about=one.about | {"site": site, "target": target})
    return Reading(known, evaluator, tokenizer)
