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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from experiments._dark_matter import errors_of
from experiments._dictionaries import agreements, coherence_scores
from experiments._finished import Finished, opened, read
from experiments._report import rows_of, write_report
from experiments._training import Result
from sae_jax import report
from sae_jax.config import Evaluating, Reporting
from sae_jax.run.folder import environment
from sae_jax.settings import to_dict
from sae_jax.trained import TrainedSAE
from sae_jax.whole_files import write_whole


@dataclass
class Config(Finished):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/audit"
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


def measure(config: Finished) -> Result:
    """Opens the SAEs and measures them."""
    known, evaluator, tokenizer = read(config)
    evaluations = {}
    for name, one in known.items():
        about = one.about
        found = evaluator(
            one.sae, one.variables, about["site"], target_site=about["target"]
        )
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
