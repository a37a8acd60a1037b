"""Explains features in words, and holds the words against text they were not made from.

After Paulo, Mallen, Juang, Belrose 2024 (arXiv:2410.13928), see
`sae_jax/analysis/interpretation`. By default nobody is asked: rules of tokens explain
and judge. With `explainer=model` or `judge=model` a language model does, by an endpoint
with OpenAI's interface or one that is loaded here; what it answers is kept, and a run
that goes on asks nothing twice.

Command:  python launch.py --experiment=interpret --sae=runs/demo/saes/topk-k200
Example:  python launch.py --experiment=interpret --sae=... --explainer=model
          --judge=model --endpoint=http://localhost:8000/v1 --model=NAME
Leaves:   out/interpretations.json, interpretations.txt, answers.jsonl
Hardware: 2 CPU cores, a minute for 50 features of the embedded model.
Note:     beside each score stands what the judge makes of other features' explanations.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from experiments._finished import Finished, Reading, opened, read
from sae_jax import coherence
from sae_jax.analysis.interpretation import by_model
from sae_jax.analysis.interpretation.asking import AskedExplainer, AskedJudge
from sae_jax.analysis.interpretation.chat import Chat, Endpoint, LocalModel, Recorded
from sae_jax.analysis.interpretation.scores import Judge, Scores, score, shuffled
from sae_jax.analysis.interpretation.token_rules import (
    Explanation,
    RuleJudge,
    TokenRules,
)
from sae_jax.analysis.interpretation.windows import Draw, Examples, Others, Sampler
from sae_jax.evaluation import steering
from sae_jax.evaluation.firings import record
from sae_jax.report.browser_chunks import token_texts
from sae_jax.text.tokenizer import load_tokenizer
from sae_jax.trained import TrainedSAE
from sae_jax.whole_files import write_whole

By = Literal["rules", "model"]
Row = dict[str, Any]
WIDTH = 60  # characters of an explanation in the table
CONTEXTS, PROMPT = 8, 24  # that are gone on from under an intervention


@dataclass
class Config(Finished):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/interpret"
    contexts: Annotated[int, "how many contexts of them"] = 512
    features: Annotated[
        tuple[int, ...], "which features, by commas; none: some are drawn"
    ] = ()
    n_features: Annotated[int, "how many are drawn"] = 50
    least: Annotated[int, "firings that a drawn feature has at least"] = 200
    length: Annotated[int, "tokens in a window"] = 32
    shown: Annotated[int, "windows of each kind that an explainer sees"] = 40
    tested: Annotated[int, "windows of each kind to judge"] = 50
    draw: Annotated[Draw, "which windows are shown"] = "deciles"
    others: Annotated[Others, "where windows without the feature come from"] = "random"
    explainer: Annotated[By, "who explains"] = "rules"
    judge: Annotated[By, "who judges"] = "rules"
    endpoint: Annotated[str, "a server with OpenAI's interface, up to /v1"] = ""
    model: Annotated[
        str, "its name for the model; without an endpoint, one to load here"
    ] = ""
    key: Annotated[str, "environment variable with the endpoint's key"] = (
        "OPENAI_API_KEY"
    )
    surprisal: Annotated[bool, "score by surprisal of the language model as well"] = (
        False
    )
    intervention: Annotated[
        float, "score by intervention, at this KL in nats; 0: do not"
    ] = 0.0
    seed: Annotated[int, "of whatever is drawn"] = 0

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        asked = "model" in (self.explainer, self.judge)
        if asked and not self.model:
            yield "model is empty; explainer or judge is to ask one, so give its name"
        if not asked and (self.model or self.endpoint):
            yield "nothing is asked of a model; give --explainer=model or --judge=model"
        if self.explainer == "model" and self.judge == "rules":
            yield "judge=rules knows only what explainer=rules says; give --judge=model"
        for name in ("n_features", "least", "shown", "tested"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1"
        if not 1 <= self.length <= self.context:
            yield f"length={self.length} must be from 1 to the context, {self.context}"
        faults = list(super().faults())
        yield from faults
        if faults:
            return
        for name, one in opened(self.sae).items():
            if one.sae.is_transcoder and self.intervention:
                yield f"{name} is a transcoder, whose features cannot be written"
            outside = [j for j in self.features if not 0 <= j < one.sae.n_features]
            if outside:
                yield f"features {outside} are none of {name}'s {one.sae.n_features}"


def run(config: Config) -> None:
    """Explains, judges, prints, and writes what was found."""
    reading = read(config)
    texts = token_texts(reading.tokenizer)
    chat = asked(config)
    out = Path(config.out).expanduser()
    rows: list[Row] = []
    for name, one in reading.saes.items():
        firings = record(
            reading.evaluator.lm,
            one.sae,
            one.variables,
            one.about["site"],
            reading.evaluator.heldout,
            target_site=one.about["target"],
            contexts_per_pass=config.contexts_per_pass,
        )
        sampler = Sampler(firings, length=config.length, seed=config.seed)
        examples = list(drawn(config, one, sampler))
        explain: Callable[[Examples], Explanation] = TokenRules(sampler, texts)
        judge: Judge = RuleJudge()
        if chat is not None:
            explain = (
                AskedExplainer(chat, texts) if by(config, "explainer") else explain
            )
            judge = AskedJudge(chat, texts) if by(config, "judge") else judge
        explanations = [explain(example) for example in examples]
        own = [score(judge, *pair) for pair in zip(explanations, examples, strict=True)]
        chance = shuffled(judge, explanations, examples, seed=config.seed)
        for i, example in enumerate(examples):
            row = row_of(name, example, explanations[i], own[i], chance[i : i + 1])
            rows.append(row | by_the_model(config, reading, one, example, row["says"]))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "interpretations.json", json.dumps(rows, indent=1) + "\n")
    text = in_columns(rows)
    write_whole(out / "interpretations.txt", text + "\n")
    print(f"\n{text}\n\nWritten to {out.resolve()}", flush=True)


def by(config: Config, part: str) -> bool:
    """Whether a model does this part."""
    return bool(getattr(config, part) == "model")


def asked(config: Config) -> Chat | None:
    """What answers; None where nothing is asked."""
    if not (by(config, "explainer") or by(config, "judge")):
        return None
    chat: Chat
    if config.endpoint:
        key = os.environ.get(config.key)
        chat = Endpoint(config.endpoint, config.model, key=key)
    else:
        here = Finished(lm=config.model)
        chat = LocalModel(here.open_lm(), load_tokenizer(config.model))
    return Recorded(Path(config.out).expanduser() / "answers.jsonl", chat)


def drawn(config: Config, one: TrainedSAE, sampler: Sampler) -> Iterator[Examples]:
    """The examples of each feature that is looked at, if there are any."""
    counts = np.diff(sampler.firings.starts)
    features = list(config.features)
    if not features:
        often = np.flatnonzero(counts >= config.least)
        rng = np.random.default_rng(config.seed)
        n = min(config.n_features, len(often))
        features = sorted(rng.choice(often, n, replace=False).tolist())
    near: dict[int, Sequence[int]] = {}
    if config.others == "neighbours":
        nearest = coherence.nearest(one.sae.weights(one.variables).W_dec, n=5).indices
        near = {j: [int(k) for k in nearest[j] if k >= 0] for j in features}
    for feature in features:
        found = sampler(
            feature,
            n_shown=config.shown,
            n_tested=config.tested,
            draw=config.draw,
            others=config.others,
            near=near.get(feature, ()),
        )
        if len(found.shown.tokens) and len(found.on.tokens):
            yield found


def row_of(
    name: str,
    example: Examples,
    explanation: Explanation,
    own: Scores,
    chance: Sequence[Scores],
) -> Row:
    """What there is to say of one feature; `chance`: with another's explanation."""
    row: Row = {"sae": name, "feature": example.feature, "says": explanation.text}
    for suffix, scores in (("", own), *(("_by_chance", one) for one in chance)):
        for kind, found in (
            ("detection", scores.detection),
            ("fuzzing", scores.fuzzing),
        ):
            row[f"{kind}_auroc{suffix}"] = known(found.auroc)
            row[f"{kind}_accuracy{suffix}"] = known(found.accuracy)
        row[f"simulation{suffix}"] = known(scores.simulation)
    truth = own.detection
    counts = {"n_on": truth.n_right, "n_off": truth.n_wrong, "n_failed": truth.n_failed}
    return row | counts


def by_the_model(
    config: Config, reading: Reading, one: TrainedSAE, example: Examples, says: str
) -> Row:
    """The scores that the language model itself gives, as far as they are wanted."""
    row: Row = {}
    lm, tokenizer = reading.evaluator.lm, reading.tokenizer
    if config.surprisal:
        found = by_model.surprisal(lm, tokenizer, says, example)
        row["surprisal_auroc"] = known(found)
    if config.intervention:
        site = one.about["site"]
        contexts = reading.evaluator.heldout.tokens[:CONTEXTS, :PROMPT]

        def edit(strength: float) -> Any:
            return steering.add(one, [example.feature], strength)

        strength = by_model.strength_for(
            lm, edit, site, contexts, divergence=config.intervention
        )
        row["intervention_strength"] = strength
        row["intervention"] = by_model.intervention(
            lm, tokenizer, says, edit(strength), site, contexts
        )
    return row


def known(value: float) -> float | None:
    """None in place of NaN, which JSON has not."""
    return None if math.isnan(value) else round(float(value), 4)


def in_columns(rows: Sequence[Row]) -> str:
    """A line for each feature, the best told first, and medians."""
    kinds = ("detection_auroc", "fuzzing_auroc", "simulation")
    heads = [f"{kind.removesuffix('_auroc')} (chance)" for kind in kinds]
    lines = ["feature  " + "  ".join(f"{head:>19}" for head in heads) + "  says"]
    for sae in dict.fromkeys(row["sae"] for row in rows):
        mine = [row for row in rows if row["sae"] == sae]
        mine.sort(key=lambda row: -(row["detection_auroc"] or 0))
        lines.append(f"{sae}: {len(mine)} features")
        middle = {
            name: known(
                float(np.median([v for v in values if v is not None] or [math.nan]))
            )
            for name in (*kinds, *(f"{kind}_by_chance" for kind in kinds))
            for values in [[row.get(name) for row in mine]]
        }
        for row in [*mine, {**middle, "feature": "median", "says": ""}]:
            numbers = "  ".join(
                f"{shown(row.get(kind)):>11} ({shown(row.get(f'{kind}_by_chance'))})"
                for kind in kinds
            )
            says = row["says"].replace("\n", " ")[:WIDTH]
            lines.append(f"{row['feature']!s:>7}  {numbers}  {says}".rstrip())
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """Two digits, or nothing."""
    return "     " if value is None else f"{value:5.2f}"
