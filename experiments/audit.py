"""Audits finished SAEs: every measure, and a report with their features.

Answers of SAEs that somebody trained, here or elsewhere: how well do they reconstruct,
what do they cost the language model, do they activate too much or too little, how near
to orthogonal are their directions, what do their features stand for, and how far do
several agree.

Command:  python launch.py --experiment=audit --sae=runs/demo/saes/topk-k200
          several by commas; --lm, --dataset and --site for SAEs that do not say them
Leaves:   out/report.html, scores.txt, results.csv, figures
Hardware: 2 CPU cores, a minute for three SAEs of the demo.
Note:     the text should be none that the SAE was trained on. Of the embedded text, and
          of any other that is split by --part, --part=heldout is that.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from experiments._report import row, write_report
from sae_jax import coherence, report
from sae_jax.config import Evaluating, ModelConfig, Reporting, TextConfig
from sae_jax.evaluation import Evaluator, HeldOut, agreement
from sae_jax.run.folder import environment
from sae_jax.settings import to_dict
from sae_jax.text.documents import Part
from sae_jax.trained import TrainedSAE, load
from sae_jax.whole_files import write_whole

ALL_PAIRS_UP_TO = 65_536  # features, in about a minute at width 768
PAIRS = 2_000_000  # of larger ones; they miss the maximum, so none is given


@dataclass
class Config(ModelConfig, TextConfig):
    """What can be set from the command line."""

    sae: Annotated[tuple[str, ...], "folders of finished SAEs, by commas"] = ()
    site: Annotated[str, "what they read; empty: what each was trained on"] = ""
    out: Annotated[str, "folder to write to"] = "runs/audit"
    part: Annotated[Part, "which documents to audit on, by a hash of names"] = "heldout"
    contexts: Annotated[int, "how many contexts of them"] = 128
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16
    report: Reporting = Reporting(browse=8)

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if not self.sae:
            yield "sae is empty; give the folders of one or more saved SAEs"
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
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"sae={','.join(folders)} names a folder twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path.parts[-depth:]): load(path) for path in paths}


def run(config: Config) -> None:
    """Measures, prints, and writes the report."""
    saes = opened(config.sae)
    tokenizer, lm = config.open_tokenizer(), config.open_lm()
    for name, one in saes.items():
        weights = one.about.get("lm_weights")
        if weights not in (None, lm.fingerprint):
            raise ValueError(
                f"{name} was trained on lm={one.about.get('lm')!r}, whose weights are "
                f"not those of lm={config.lm!r}; give that model"
            )
        here = Evaluating(dataset=config.dataset, part=config.part)
        if (text := text_of(one)) and here.overlaps(text):
            print(f"Note: {name} was trained on this text, or part of it.", flush=True)
    heldout = HeldOut.read(
        config.open_documents(),
        tokenizer,
        config.packing(repeat=False),
        config.contexts,
    )
    evaluator = Evaluator(lm, heldout, contexts_per_pass=config.contexts_per_pass)
    known, evaluations = {}, {}
    for name, one in saes.items():
        site, target = config.sites(one)
        known[name] = replace(one, about=one.about | {"site": site, "target": target})
        found = evaluator(one.sae, one.variables, site, target_site=target)
        scores = found.scores | coherence_scores(one)
        evaluations[name] = found._replace(scores=scores)
    # Of one that diverged there is nothing to look into.
    whole = [n for n, e in evaluations.items() if math.isfinite(e.scores["nmse"])]
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    rows = [row(name, one, evaluations[name].scores) for name, one in known.items()]
    notes = {"All scores": report.scores_text(rows)}
    if agreeing := agreements({name: known[name] for name in whole}):
        notes["Agreement of dictionaries"] = agreeing
    text = "\n\n".join(notes.values())
    write_whole(out / "scores.txt", text + "\n")
    print(f"\n{text}\n", flush=True)
    write_report(
        out,
        known,
        evaluations,
        evaluator,
        tokenizer,
        browse=whole[: config.report.browse],
        n_steered=config.report.steer,
        title=f"Audit of {', '.join(known)}",
        made="Measured",
        about=f"Language model: {config.lm}. Text: {config.dataset}.",
        figures=[],
        notes=notes,
        settings=to_dict(config),
        environment=environment(),
    )


def text_of(one: TrainedSAE) -> dict[str, Any] | None:
    """What text it was trained on, if it says so."""
    return one.about.get("text", one.about.get("shards", {}).get("text"))


def coherence_scores(one: TrainedSAE) -> dict[str, float]:
    """How near to orthogonal the decoder's directions are."""
    W_dec, scores = directions(one), {}
    if len(W_dec) < 2:
        return {}
    if len(W_dec) <= ALL_PAIRS_UP_TO:
        found = coherence.exact(W_dec, quantiles=(0.99,))
        scores["coherence_maximum"] = found.maximum
    else:
        found = coherence.sampled(W_dec, n_pairs=PAIRS, seed=0, quantiles=(0.99,))
    scores |= {"coherence_mean": found.mean, "coherence_99": found.quantiles[0.99]}
    return scores


def directions(one: TrainedSAE) -> np.ndarray:
    """The decoder rows that have a direction: those of zeros and NaN have none."""
    W_dec = np.asarray(one.sae.weights(one.variables).W_dec)
    norms = np.linalg.norm(W_dec, axis=1)
    return W_dec[np.isfinite(norms) & (norms > 0)]


def agreements(saes: Mapping[str, TrainedSAE]) -> str:
    """How far the dictionaries of SAEs that write to one site agree, two by two."""
    aims = {
        name: one.about["target"] or one.about["site"] for name, one in saes.items()
    }
    pairs = [(a, b) for a, b in itertools.permutations(saes, 2) if aims[a] == aims[b]]
    lines = ["Of the directions of the first, the largest cosine with the second's:"]
    for a, b in pairs:
        found = agreement.best_matches(directions(saes[a]), directions(saes[b]))
        above = found.shares_above()
        shares = ", ".join(f"{share:.1%} above {t}" for t, share in above.items())
        lines.append(f"{a} in {b}: mean {found.mean():.3f}, {shares}")
    return "\n".join(lines) if pairs else ""
