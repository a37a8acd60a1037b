"""Heads of a circuit found by codes of an SAE: planted ones, and those for induction.

After O'Neill, Bui 2024 (arXiv:2405.12522), as far as it is known; what we put in the
place of the rest is at the top of `sae_jax/analysis/circuits.py`. Three times: vectors
in which some heads are planted; a model of two layers that was trained to repeat; and
the language model. Positive prompts have a block of random tokens twice, negative ones
have another block before the same last one. The circuit is known by the pattern of
attention, and by the loss that comes from putting a head's mean in its place.

Command:  python launch.py --experiment=circuits
Example:  python launch.py --experiment=circuits --lm=gpt2 --prompts=64 --position=last
Leaves:   out/circuits.json, circuits.txt, figures/circuits.png, report.html
Hardware: 2 CPU cores, some minutes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from experiments import _induction_lm as repeating
from experiments._planted_heads import codes_of, plant
from sae_jax import report
from sae_jax.analysis import circuits, heads
from sae_jax.analysis.circuits import Found
from sae_jax.config import ModelConfig
from sae_jax.report import drawing
from sae_jax.report.circuits import circuits_figure
from sae_jax.run.folder import environment
from sae_jax.settings import Spec, to_dict
from sae_jax.whole_files import write_whole

Truth = Literal["pattern", "ablation"]
SHARE = 0.1  # of the largest rise in loss, which makes a head part of the circuit
CAPTION = (
    "Left: the score of each head by its codes, mean of the seeds, over how much it "
    "attends to what came next before. Right: areas under the ROC curve for the heads "
    "and pairs of the circuit, a point for each seed; shuffled: kinds of prompts drawn "
    "by lot."
)


@dataclass
class Config(ModelConfig):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/circuits"
    rule: Annotated[Spec, "of the SAE"] = Spec("relu(coef=0.02)")
    n_features: Annotated[int, "of the SAE: how many codes there can be"] = 128
    steps: Annotated[int, "training steps of an SAE, each on all vectors"] = 500
    prompts: Annotated[int, "prompts of each kind"] = 10
    length: Annotated[int, "tokens in a block"] = 12
    position: Annotated[heads.Position, "which output of a head is its vector"] = "mean"
    threshold: Annotated[float, "of the score, from which a head is chosen"] = (
        circuits.THRESHOLD
    )
    softmax: Annotated[bool, "whether the threshold is for shares of a softmax"] = False
    attends: Annotated[
        float, "attention to what came next before, that makes an induction head"
    ] = 0.25
    repeating: Annotated[int, "training steps of the model that repeats; 0: none"] = (
        1500
    )
    noise: Annotated[float, "of planted heads"] = 0.05
    seeds: Annotated[tuple[int, ...], "of prompts, plantings and SAEs"] = (0, 1, 2, 3)

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if not self.seeds or self.prompts < 2 or self.steps < 1:
            yield "there must be a seed, two prompts and a step"
        if not repeating.SHORTEST <= self.length <= repeating.LONGEST:
            yield (
                f"length={self.length} must be from {repeating.SHORTEST} to "
                f"{repeating.LONGEST}"
            )
        yield from self.model_faults(("head_out.0",), 2 * self.length + 1)


class Known(NamedTuple):
    """What is known of the heads of a model."""

    attention: Float[np.ndarray, " H"]
    rise: Float[np.ndarray, " H"]
    clean: float  # loss of what is repeated
    none: float  # with the mean in the place of every head
    means: Float[np.ndarray, "H d"]

    def circuit(self, truth: Truth, attends: float) -> Bool[np.ndarray, " H"]:
        """The heads that do the task."""
        if truth == "pattern":
            return self.attention >= attends
        return self.rise >= SHARE * self.rise.max()


def run(config: Config) -> None:
    """Trains, scores, prints, and writes what was found."""
    out = Path(config.out).expanduser()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    rows = [of_planted(config, seed) for seed in config.seeds]
    models = {config.lm: config.open_lm()}
    losses: list[float] = []
    if config.repeating:
        print("Training a model to repeat ...", flush=True)
        model, losses = repeating.train(steps=config.repeating)
        models = {"trained to repeat": model} | models
    shown, of_heads = {}, {}
    for name, lm in models.items():
        known, scores, found = of_model(config, name, lm)
        shown[name] = (known.attention, scores)
        rows += found
        of_heads[name] = known._asdict() | {"score": scores}
    text = in_columns(rows)
    write_whole(out / "circuits.txt", f"{text}\n")
    record = {
        "rows": rows,
        "heads": {n: plain(one) for n, one in of_heads.items()},
        "repeating_loss": losses[-1:],
        "settings": to_dict(config),
    }
    write_whole(out / "circuits.json", json.dumps(record, indent=1) + "\n")
    picture = out / "figures" / "circuits.png"
    drawn = {
        name: [r for r in rows if r["model"] == name and r["truth"] != "ablation"]
        for name in ("planted vectors", *models)
    }
    drawing.save(circuits_figure(shown, drawn), picture)
    print(f"\n{text}\n", flush=True)
    report.write_page(
        out / "report.html",
        title="Circuits by discrete codes",
        summary=f"Language model: {config.lm}. {config.prompts} prompts of each kind.",
        rows=[],
        figures=[(picture, CAPTION)],
        notes={"Heads and pairs of the circuit": text},
        config=to_dict(config),
        about=environment(),
    )
    print(f"Report: {(out / 'report.html').resolve()}")


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it; vectors of heads are left out."""
    return {
        name: np.asarray(value).tolist()
        for name, value in values.items()
        if name != "means"
    }


def of_planted(config: Config, seed: int) -> dict[str, Any]:
    """Planted heads."""
    planted = plant(seed, noise=config.noise)
    codes = trained(config, planted.positive, planted.negative, seed)
    return row_of(config, "planted vectors", "planted", seed, codes, planted.circuit)


def trained(
    config: Config, positive: np.ndarray, negative: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The codes of both kinds of prompts."""
    return codes_of(
        positive,
        negative,
        config.rule,
        n_features=config.n_features,
        steps=config.steps,
        seed=seed,
    )


def of_model(
    config: Config, name: str, lm: Any
) -> tuple[Known, Float[np.ndarray, " H"], list[dict[str, Any]]]:
    """What is known of a model's heads, their mean scores, and a row for each seed."""
    vocabulary, length = lm.config.vocab_size, config.length
    known = known_of(lm, length)
    rows, scores = [], []
    for seed in config.seeds:
        rng = np.random.default_rng((seed, 1))
        pair = repeating.contrast(rng, config.prompts, length, vocabulary)
        held = [
            heads.vectors(
                heads.outputs(lm, tokens, skip=length + 1), position=config.position
            )
            for tokens in pair
        ]
        codes = trained(config, held[0], held[1], seed)
        scored = circuits.scores(*codes).nodes
        scores.append(scored)
        chosen = circuits.chosen(scored, config.threshold, softmax=config.softmax)
        some = np.random.default_rng(seed).permutation(chosen)
        faithful = faithfulness(lm, known, pair[0], length, [chosen, some])
        for truth in ("pattern", "ablation"):
            circuit = known.circuit(truth, config.attends)
            row = row_of(config, name, truth, seed, codes, circuit)
            rows.append(
                row
                | {"chosen": int(chosen.sum()), "faithfulness": faithful[0]}
                | {"faithfulness_of_others": faithful[1]}
            )
    return known, np.mean(scores, axis=0), rows


def known_of(lm: Any, length: int) -> Known:
    """By attention, and by putting means in the place of heads one by one."""
    rng = np.random.default_rng(0)
    tokens, other = repeating.contrast(rng, 32, length, lm.config.vocab_size)
    means = heads.outputs(lm, other, skip=length + 1).mean((0, 1))
    n = len(means)
    choices = [
        np.ones(n, bool),
        np.zeros(n, bool),
        *(np.arange(n) != h for h in range(n)),
    ]
    losses = heads.losses_keeping(lm, tokens, choices, means, last=length - 1)
    attention = heads.induction(lm, tokens, length)
    return Known(
        attention, losses[2:] - losses[0], float(losses[0]), float(losses[1]), means
    )


def faithfulness(
    lm: Any, known: Known, tokens: np.ndarray, length: int, choices: list[np.ndarray]
) -> list[float]:
    """How much of what all heads bring, some do alone: (none - some) / (none - all)."""
    n = len(known.means)
    ends = [np.ones(n, bool), np.zeros(n, bool)]
    everything, none, *some = heads.losses_keeping(
        lm, tokens, [*ends, *choices], known.means, last=length - 1
    )
    return [float((none - one) / (none - everything)) for one in some]


def row_of(
    config: Config,
    model: str,
    truth: str,
    seed: int,
    codes: tuple[np.ndarray, np.ndarray],
    circuit: Bool[np.ndarray, " H"],
) -> dict[str, Any]:
    """How well the codes know the circuit, and prompts of kinds drawn by lot."""
    options: Any = {"threshold": config.threshold, "softmax": config.softmax}
    own: Found = circuits.found(circuits.scores(*codes), circuit, **options)
    chance = circuits.shuffled(*codes, circuit, seed=seed, **options)
    row: dict[str, Any] = {"model": model, "truth": truth, "seed": seed}
    row |= {"in_circuit": int(circuit.sum()), "heads": len(circuit)}
    for suffix, one in (("", own), ("_shuffled", chance)):
        for name, value in one._asdict().items():
            row[f"{name}{suffix}"] = None if np.isnan(value) else round(value, 4)
    return row


def in_columns(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and the range."""
    scores = (*Found._fields, "faithfulness")
    lines = ["Mean over seeds (lowest to highest); in brackets by chance"]
    for kind in dict.fromkeys((row["model"], row["truth"]) for row in rows):
        own = [row for row in rows if (row["model"], row["truth"]) == kind]
        lines.append(
            f"{kind[0]}, circuit by {kind[1]}: {own[0]['in_circuit']} of "
            f"{own[0]['heads']} heads, {len(own)} seeds"
        )
        for name in scores:
            beside = "_of_others" if name == "faithfulness" else "_shuffled"
            values, chance = (
                np.array([row[n] for row in own if row.get(n) is not None], float)
                for n in (name, f"{name}{beside}")
            )
            if len(values):
                lines.append(
                    f"  {name:<13} {values.mean():6.3f} ({values.min():.2f} to "
                    f"{values.max():.2f})  [{chance.mean():.3f}]"
                )
    return "\n".join(lines)
