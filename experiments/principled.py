"""Dictionaries against attributes that are known, after Makelov, Lange, Nanda 2024.

arXiv:2405.08366. A task from templates that the language model really does; what
varies between its prompts is known. Dictionaries whose features are those values,
supervised, say what is to be had; SAEs are held against them, on three axes: do
reconstructions keep what the model uses (approximation), can an attribute be edited by
exchanging few features (sparse control), and do features tell the attributes
(interpretability).

Command:  python launch.py --experiment=principled
Example:  python launch.py --experiment=principled --task=assign
          python launch.py --experiment=principled --lm=gpt2 --task=ioi
          --dataset=Skylion007/openwebtext
Leaves:   out/principled.json, principled.txt, figures/principled.png, report.html, and
          the SAEs in out/saes
Hardware: 2 CPU cores, 3 to 5 minutes of processor time.
Expected: supervised edits agree in 90 % (nothing edited 0 %); the task's SAE needs 8
          features for that, two thirds of the reconstruction.
Note:     SAEs are trained on the task's own activations (once more with a frozen random
          decoder, and with the weakest attribute made weaker and stronger) and on those
          of text; `--saes` adds finished ones of the task's site. How often doing
          nothing agrees stands beside all edits, F1 of shuffled labels beside all F1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments._finished import opened
from experiments._left import leave_found, leave_page
from experiments._principled import Represent, Row, Trial, measure
from experiments._principled_saes import (
    RANDOM,
    TASK,
    dictionary_of,
    occlusion,
    shares,
    text_rows,
    trained,
)
from sae_jax.analysis.places import Place
from sae_jax.analysis.principled.interpretability import (
    MOST_IN_UNION,
    MOST_IN_UNION_OF_TEXT,
)
from sae_jax.analysis.principled.sparse import decomposed
from sae_jax.analysis.principled.supervised import by_least_squares, by_means
from sae_jax.analysis.tasks import TASKS
from sae_jax.config import Dictionary, ModelConfig, TextConfig
from sae_jax.report import drawing
from sae_jax.report.principled import all_text, control_figure
from sae_jax.settings import Spec
from sae_jax.trained import TrainedSAE
from sae_jax.training.recipe import Recipe

TITLE = "Dictionaries against known attributes"
CAPTION = (
    "Above: how often an edit of one attribute by k features makes the model predict "
    "what it predicts when patched with the counterfactual's own row; dashed: with "
    "nothing edited. Below: reconstructions in place of rows (sufficiency) and all but "
    "them (necessity), 1 at best; the highest F1 of any feature for a value, mean over "
    "an attribute's values, hollow with shuffled labels; and the same of SAEs trained "
    "on rows in which the attribute that moves them least is weaker or stronger."
)


@dataclass
class Config(ModelConfig, TextConfig):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/principled"
    task: Annotated[
        Literal["close", "assign", "ioi"], "which task; ioi is for GPT-2"
    ] = "close"
    places: Annotated[
        tuple[str, ...],
        "where its rows are, patched together, as 'site@position' or "
        "'head_out.9/6@end', by commas; none: the task's own",
    ] = ()
    saes: Annotated[
        tuple[str, ...], "folders of finished SAEs of the place's site, by commas"
    ] = ()
    rule_files: Annotated[
        tuple[str, ...], "Python files with their rules, if they are of your own"
    ] = ()
    rule: Annotated[Spec, "the rule of new SAEs"] = Spec("topk(k=8)")
    n_fit: Annotated[int, "prompts that dictionaries are fitted on"] = 2000
    n_tested: Annotated[int, "other prompts, that all is counted on"] = 300
    ks: Annotated[tuple[int, ...], "features exchanged by an edit, by commas"] = (
        1,
        2,
        4,
        8,
        32,
    )
    contexts: Annotated[int, "contexts of text that the text SAE is trained on"] = 512
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16
    factors: Annotated[
        tuple[float, ...],
        "the weakest attribute is made so many times as strong, for SAEs trained on "
        "such rows, by commas; none: no such SAEs",
    ] = (0.5, 2.0, 4.0)
    sae: Dictionary = Dictionary(treatment="scale", expansion=4, b_dec_start="mean")
    batch: Annotated[int, "rows per step of training"] = 256
    train: Recipe = Recipe(steps=1000, lr=1e-3, warmup=50, decay="linear")
    seed: Annotated[int, "of prompts and of SAEs"] = 0

    def where(self) -> tuple[Place, ...]:
        """The places."""
        return tuple(map(Place.parse, self.places or TASKS[self.task].places))

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        yield from self.text_faults()
        try:
            places = self.where()
        except ValueError as error:
            yield str(error)
            return
        yield from self.model_faults(tuple(p.site for p in places), self.context)
        if self.saes and len(places) > 1:
            yield f"saes are of one site, and the task has {len(places)} places"
        elif self.saes:
            yield from self.misfits(places[0])
        for name in ("n_fit", "n_tested", "contexts", "contexts_per_pass", "batch"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1"
        if not self.ks or min(self.ks) < 1:
            yield "ks must be one or more numbers of features, from 1 on"
        if self.batch > self.n_fit:
            yield f"batch={self.batch} is more than the n_fit={self.n_fit} rows"

    def misfits(self, place: Place) -> Iterator[str]:
        """Finished SAEs that cannot read the place."""
        try:
            found, lm = opened(self.saes), self.outline()
            if lm is None:
                return  # PyTorch's model is not loaded yet
            width = lm.width(place.site)
            n = len(range(width)[place.columns(lm, width)])
        except (ValueError, OSError) as error:
            yield from str(error).split("\n")
            return
        for name, one in found.items():
            if one.sae.d_in != n or one.sae.is_transcoder:
                yield f"{name} is no autoencoder of a width of {n}, that of {place}"


def run(config: Config) -> None:
    """Fits, trains, measures, prints, and writes what was found."""
    known, places = TASKS[config.task], config.where()
    lm, tokenizer = config.open_lm(), config.open_tokenizer()
    print(f"The task {config.task}, at {', '.join(map(str, places))} ...", flush=True)
    trial = Trial.prepare(
        lm,
        tokenizer,
        known,
        places,
        n_fit=config.n_fit,
        n_tested=config.n_tested,
        seed=config.seed,
    )
    out = Path(config.out).expanduser()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    supervised = {
        "mean": partial(_supervised, trial, by_means),
        "MSE": partial(_supervised, trial, by_least_squares),
    }
    saes, occluded = trained(config, trial, text_rows(config, lm, tokenizer, places))
    for name, of_places in saes.items():
        for place, one in of_places.items():
            one.save(out / "saes" / f"{name}-{_plain(place)}".replace(" ", "-"))
    if config.saes:
        saes |= {name: {places[0]: one} for name, one in opened(config.saes).items()}
    ways: dict[str, Represent] = {**supervised}
    ways |= {name: partial(_by_sae, one) for name, one in saes.items()}
    of_task = (*supervised, TASK, RANDOM)
    rows: list[Row] = []
    for name, represent in ways.items():
        print(f"Measuring {name} ...", flush=True)
        found = measure(
            trial,
            represent,
            config.ks,
            most=MOST_IN_UNION if name in of_task else MOST_IN_UNION_OF_TEXT,
            supervised=name in supervised,
        )
        rows.append({"name": name, **found})
    record: dict[str, Any] = {
        "model": trial.model(),
        "shares": shares(trial),
        "dictionaries": rows,
        "occlusion": occlusion(trial, occluded),
    }
    notes = all_text(config.task, record)
    text = "\n\n".join(f"{heading}\n{said}" for heading, said in notes.items())
    leave_found("principled", config, text, record)
    picture = out / "figures" / "principled.png"
    drawing.save(control_figure(record), picture)
    leave_page(
        config,
        title=TITLE,
        summary=f"Language model: {config.lm}. Task: {config.task}.",
        figures=[(picture, CAPTION)],
        notes=notes,
    )


def _supervised(trial: Trial, fit: Any, place: Place, rows: Any, values: Any) -> Any:
    return dictionary_of(trial, fit, place)(values)


def _by_sae(saes: dict[Place, TrainedSAE], place: Place, rows: Any, values: Any) -> Any:
    return decomposed(saes[place], rows)


def _plain(place: Place) -> str:
    return str(place).replace("/", ".")
