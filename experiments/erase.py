"""Erases a concept from a language model by features of an SAE; other text is to stay.

After "Interpret then deactivate", see `sae_jax/analysis/erasure.py`. What a text is
about is told by identifiers in it: contexts with several of `words` are about the
concept, contexts with none of them are not. Features are chosen on prompts of one part
of the text and tried on another: with and without the gate, beside as many features by
lot, and on paraphrases, in which the tell-tale words are replaced.

Command:  python launch.py --experiment=erase --sae=runs/train
Example:  python launch.py --experiment=erase --sae=runs/train --targets=64
          --retained=256
Leaves:   out/erase.json, erase.txt, report.html, figures/erase1.png for the first SAE
Hardware: 2 CPU cores, a minute and a half.
Expected: on the files of Python 3.11 with a TopK of 1,536 features and five seeds, an
          AUC of .68 to .87; the loss of the concept rises by 1.0 to 1.9 nats, that of
          other text by .4 to .7; less than two thirds of the paraphrases are noticed.
Note:     beside each area under the ROC curve stands that of shuffled labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from experiments._erase import Texts, drawn, renamed, split, tried
from experiments._finished import Finished, opened, read
from experiments._left import leave_found, leave_page
from experiments._report import Figure
from sae_jax.analysis import erasure
from sae_jax.evaluation import HeldOut
from sae_jax.evaluation.firings import record
from sae_jax.lm.source import Source
from sae_jax.report import drawing
from sae_jax.report.erasure import effects_figure, effects_text
from sae_jax.text.documents import Part
from sae_jax.trained import TrainedSAE

TITLE = "Erasing a concept"
CAPTION = (
    "Left: how far the edit raises the model's loss, by kind of text. Right: the share "
    "of prompts whose response to the edit is above a size; dotted: the gate."
)
WORDS = (
    "re regex regexp regexps sre pattern patterns match matches matching matched "
    "fullmatch findall finditer groupdict lookbehind lookahead backreference substring"
)
# Words of the same files that say nothing of regular expressions.
OTHERS = (
    "rx tool tools kit gear form forms hit hits hitting hit allhit getall walkall "
    "namedict backview foreview sameagain slice"
)


@dataclass
class Config(Finished):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/erase"
    context: Annotated[int, "tokens per context, which is a prompt"] = 24
    join: Annotated[bool, "whether a context may hold several documents"] = False
    skip: Annotated[int, "positions at each start that are not edited"] = 1
    contexts: Annotated[int, "contexts of each kind that are tried, at most"] = 400
    among: Annotated[int, "contexts to look through for prompts, and to try"] = 60_000
    words: Annotated[tuple[str, ...], "identifiers that tell of the concept"] = tuple(
        WORDS.split()
    )
    paraphrase: Annotated[
        tuple[str, ...], "what replaces each of them, to go unnoticed"
    ] = tuple(OTHERS.split())
    least: Annotated[int, "how many of them make a context one of the concept"] = 3
    prompts_part: Annotated[Part, "documents that features are chosen on"] = "train"
    targets: Annotated[int, "target prompts"] = 16
    retained: Annotated[int, "retained prompts"] = 64
    strongest: Annotated[int, "features of each prompt that are compared"] = 32
    factor: Annotated[float, "what the chosen ones are multiplied by"] = erasure.FACTOR
    margin: Annotated[float, "the gate, as a share of the least target response"] = (
        erasure.MARGIN
    )
    draws: Annotated[int, "sets of features by lot"] = 5
    seed: Annotated[int, "of whatever is drawn"] = 0

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if len(self.words) != len(self.paraphrase):
            yield (
                f"words are {len(self.words)} and paraphrase {len(self.paraphrase)}; "
                f"each word needs what replaces it"
            )
        for name in ("least", "targets", "retained", "strongest", "draws"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1"
        if self.prompts_part == self.part or "all" in (self.prompts_part, self.part):
            yield (
                f"prompts_part={self.prompts_part!r} and part={self.part!r} share "
                f"documents; choose features on others than those that are tried"
            )
        if self.skip < 1:
            yield "skip=0: position 0 is never edited; give at least 1"
        if self.join:
            yield "join: a prompt is of one document; give --join=false"
        faults = list(super().faults())
        yield from faults
        for name, one in opened(self.sae).items() if not faults else ():
            if one.sae.is_transcoder:
                yield f"{name} is a transcoder, whose features cannot be written"


def run(config: Config) -> None:
    """Chooses features, erases them, prints, and writes what was found."""
    reading = read(config)
    prompts, kinds = texts(config, reading.tokenizer)
    out = Path(config.out).expanduser()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    notes, figures, found = {}, [], {}
    for number, (name, one) in enumerate(reading.saes.items(), 1):
        chosen = choose(config, one, reading.evaluator.lm, prompts)
        rows, responses = effects(config, one, reading.evaluator.lm, *chosen, kinds)
        picture = out / "figures" / f"erase{number}.png"
        drawing.save(effects_figure(rows, responses), picture)
        figures.append(Figure(picture, f"{name}. {CAPTION}"))
        notes[f"{TITLE}: {name}"] = effects_text(rows)
        found[name] = {"features": chosen[0].tolist(), "effects": rows}
    text = "\n\n".join(f"{head}\n\n{said}" for head, said in notes.items())
    leave_found("erase", config, text, {"saes": found})
    title = f"{TITLE} by {', '.join(reading.saes)}"
    leave_page(config, title=title, figures=figures, notes=notes)


def texts(config: Config, tokenizer: Any) -> tuple[Texts, dict[str, HeldOut]]:
    """Prompts to choose features on, and kinds of text to try them on."""
    rng = np.random.default_rng(config.seed)
    found = []
    for part in (config.prompts_part, config.part):
        documents = replace(config, part=part).open_documents()
        packing, words = config.packing(repeat=False), config.words
        both = split(documents, tokenizer, packing, config.among, words, config.least)
        found.append(both)
        for kind, one in both._asdict().items():
            if not len(one.tokens):
                raise ValueError(
                    f"part={part!r} has no text of kind {kind} among the first "
                    f"{config.among} contexts; look through more, or give other words"
                )
    prompts, rest = found
    prompts = Texts(
        drawn(prompts.concept, config.targets, rng),
        drawn(prompts.other, config.retained, rng),
    )
    concept = drawn(rest.concept, config.contexts, rng)
    other = drawn(rest.other, config.contexts, rng)
    hidden = renamed(concept, tokenizer, config.words, config.paraphrase)
    return prompts, {"concept": concept, "paraphrased": hidden, "other": other}


def choose(
    config: Config, one: TrainedSAE, lm: Source, prompts: Texts
) -> tuple[np.ndarray, list[np.ndarray], HeldOut]:
    """Features of the concept, sets of as many by lot, and the target prompts.

    The lot is drawn among all features that are active in a target prompt.
    """
    n = config.contexts_per_pass
    at = one.about["site"]
    target, retained = (
        erasure.peaks(record(lm, one.sae, one.variables, at, part, contexts_per_pass=n))
        for part in prompts
    )
    features = erasure.contrast(target, retained, config.strongest)
    rng = np.random.default_rng((config.seed, 1))
    active = np.setdiff1d(np.flatnonzero(target.any(0)), features)
    size = min(len(features), len(active))
    lots = [rng.choice(active, size, replace=False) for _ in range(config.draws)]
    return features, lots, prompts.concept


def effects(
    config: Config,
    one: TrainedSAE,
    lm: Source,
    features: np.ndarray,
    lots: list[np.ndarray],
    target: HeldOut,
    kinds: dict[str, HeldOut],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row of scores of the chosen features, one of those by lot, and responses."""
    scores, responses = zip(
        *(
            tried(
                one,
                lm,
                one.about["site"],
                ids,
                target,
                kinds,
                factor=config.factor,
                margin=config.margin,
                contexts_per_pass=config.contexts_per_pass,
            )
            for ids in (features, *lots)
        ),
        strict=True,
    )
    by_lot = {n: float(np.mean([lot[n] for lot in scores[1:]])) for n in scores[0]}
    rows = [{"name": "chosen", **scores[0]}, {"name": "by lot", **by_lot}]
    return rows, responses[0]
