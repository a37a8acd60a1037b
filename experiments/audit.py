"""Audits finished SAEs: every measure, and a report with their features.

Answers of SAEs that somebody trained, here or elsewhere: how well do they reconstruct,
what do they cost the language model, do they activate too much or too little, how near
to orthogonal are their directions, how much of their error is linear, what do their
features stand for, and how far do several agree.

Command:  python launch.py --experiment=audit --sae=runs/demo/saes/topk-k200
          several by commas; --lm, --dataset and --site for SAEs that do not say them
Leaves:   out/report.html, scores.txt, results.csv, figures
Hardware: 2 CPU cores, a minute for three SAEs of the demo.
Note:     the text should be none that the SAE was trained on. Of the embedded text, and
          of any other that is split by --part, --part=heldout is that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from experiments._dark_matter import errors_of
from experiments._dictionaries import agreements, coherence_scores
from experiments._report import rows_of, write_report
from experiments._training import Result
from sae_jax import report
from sae_jax.config import Evaluating, ModelConfig, Reporting, TextConfig
from sae_jax.evaluation import Evaluator, HeldOut
from sae_jax.exchange import load, place
from sae_jax.run.folder import CONFIG, environment
from sae_jax.settings import to_dict
from sae_jax.text.documents import Part
from sae_jax.trained import TrainedSAE
from sae_jax.whole_files import write_whole


@dataclass
class Config(ModelConfig, TextConfig):
    """What can be set from the command line."""

    sae: Annotated[
        tuple[str, ...],
        "folders or files of finished SAEs, by commas, also of other libraries and on "
        "the Hugging Face hub; the folder of a run stands for all of its SAEs",
    ] = ()
    rule_files: Annotated[
        tuple[str, ...], "Python files with their rules, if they are of your own"
    ] = ()
    site: Annotated[str, "what they read; empty: what each was trained on"] = ""
    out: Annotated[str, "folder to write to"] = "runs/audit"
    part: Annotated[Part, "which documents to audit on, by a hash of names"] = "heldout"
    contexts: Annotated[int, "how many contexts of them"] = 128
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16
    dark_matter: Annotated[
        bool,
        "split the error in a linear and a nonlinear part, fitted on half of the "
        "contexts; costs the model 2.5 passes over all, where all else costs 2 an SAE",
    ] = True
    pursuit: Annotated[
        bool,
        "with it, other codes of the same L0 by gradient pursuit; costs L0 times as "
        "much as encoding, and the 2.5 passes again",
    ] = False
    report: Reporting = Reporting(browse=8)

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


def measure(config: Config) -> Result:
    """Opens the SAEs and measures them; their `about` says where."""
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
    known, evaluations = {}, {}
    for name, one in saes.items():
        site, target = config.sites(one)
        known[name] = replace(one, about=one.about | {"site": site, "target": target})
        found = evaluator(one.sae, one.variables, site, target_site=target)
        scores = found.scores | coherence_scores(one)
        evaluations[name] = found._replace(scores=scores)
    return Result(known, evaluations, evaluator, tokenizer)


def run(config: Config) -> None:
    """Measures, prints, and writes the report."""
    saes = opened(config.sae)
    known, evaluations, evaluator, tokenizer = measure(config)
    # Of one that diverged there is nothing to look into.
    whole = [n for n, e in evaluations.items() if math.isfinite(e.scores["nmse"])]
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(known, evaluations)
    n_tokens = int(evaluator.heldout.use.sum())
    summary = (
        f"Measured on {n_tokens:,} tokens of {config.dataset} (part: "
        f"{config.part}). Language model: {config.lm}."
    )
    notes = {"All scores": report.scores_text(rows)}
    if remarks := "\n".join(what_to_know(config, saes)):
        notes["Note"] = remarks
    if config.dark_matter:
        dark = errors_of(
            {name: known[name] for name in whole}, evaluator, pursuit=config.pursuit
        )
        notes["Linear and nonlinear error"] = dark.text()
        rows = dark.beside(rows)
    if agreeing := agreements({name: known[name] for name in whole}):
        notes["Agreement of dictionaries"] = agreeing
    text = "\n\n".join([summary, *notes.values()])
    write_whole(out / "scores.txt", text + "\n")
    print(f"\n{text}\n", flush=True)
    write_report(
        out,
        rows,
        known,
        evaluations,
        evaluator,
        tokenizer,
        browse=whole[: config.report.browse],
        n_steered=config.report.steer,
        title=f"Audit of {', '.join(known)}",
        summary=summary,
        figures=[],
        notes=notes,
        settings=to_dict(config),
        environment=environment(),
    )


def what_to_know(config: Config, saes: dict[str, TrainedSAE]) -> Iterator[str]:
    """What makes the scores of an SAE mean less than they seem to."""
    here = Evaluating(dataset=config.dataset, part=config.part)
    for name, one in saes.items():
        if (text := text_of(one)) and here.overlaps(text):
            yield f"{name} was trained on this text, or part of it."
        trained = one.about.get("site")
        if trained not in (None, config.sites(one)[0]):
            yield f"{name} was trained on {trained}, and is measured elsewhere."


def text_of(one: TrainedSAE) -> dict[str, Any] | None:
    """What text it was trained on, if it says so."""
    return one.about.get("text", one.about.get("shards", {}).get("text"))
