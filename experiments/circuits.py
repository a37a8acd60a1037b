"""Heads of a circuit found by codes of an SAE: planted ones, and those for induction.

After O'Neill, Bui 2024 (arXiv:2405.12522), as far as it is known; what we put in the
place of the rest is at the top of `sae_jax/analysis/circuits.py`. Three times: vectors
in which some heads are planted; a model of two layers that was trained to repeat random
tokens; and the language model, on text. Positive prompts have a block of tokens twice,
negative ones have another block before the same last one. The circuit is known by the
pattern of attention, and by the loss that comes from a head's mean in its place.

Command:  python launch.py --experiment=circuits
Example:  python launch.py --experiment=circuits --lm=gpt2 --prompts=64 --position=last
Leaves:   out/circuits.json, circuits.txt, figures/circuits.png, report.html
Hardware: 2 CPU cores, a minute of processor time (three on a busy machine).
Expected: planted heads .93 (prompts of kinds drawn by lot .67); heads that copy in the
          model trained to repeat .74 (.63); the embedded model's induction heads, three
          that attend weakly, .51 (.54): as by chance.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from experiments import _repeating_lm as repeating
from experiments._circuits_text import in_columns
from experiments._left import leave_found, leave_page
from experiments._planted_heads import codes_of, plant
from sae_jax.analysis import circuits, heads
from sae_jax.analysis.circuits import Found
from sae_jax.config import ModelConfig, TextConfig
from sae_jax.evaluation import HeldOut
from sae_jax.report import drawing
from sae_jax.report.circuits import circuits_figure
from sae_jax.settings import Spec
from sae_jax.text.documents import Part

Truth = Literal["pattern", "ablation"]
SHARE, LEAST = 0.1, 0.02  # of the largest rise in loss, and nats: else no part of it
KNOWN_BY = 32  # prompts from which it is known what heads do
Blocks = Callable[[np.random.Generator, int], np.ndarray]
CAPTION = (
    "Left: the score of each head by its codes, mean of the seeds, over how much it "
    "attends to what came next before. Right: areas under the ROC curve for the heads "
    "and pairs of the circuit, a point for each seed; shuffled: kinds of prompts drawn "
    "by lot."
)


@dataclass
class Config(ModelConfig, TextConfig):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/circuits"
    rule: Annotated[Spec, "of the SAE"] = Spec("relu(coef=0.02)")
    n_features: Annotated[int, "of the SAE: how many codes there can be"] = 128
    steps: Annotated[int, "training steps of an SAE, each on all vectors"] = 500
    prompts: Annotated[int, "prompts of each kind"] = 10
    length: Annotated[int, "tokens in a block"] = 24
    position: Annotated[heads.Position, "which output of a head is its vector"] = "mean"
    threshold: Annotated[float, "of the score, from which a head is chosen"] = (
        circuits.THRESHOLD
    )
    softmax: Annotated[bool, "whether the threshold is for shares of a softmax"] = False
    attends: Annotated[
        float, "attention to what came next before, that makes an induction head"
    ] = 0.1
    repeating: Annotated[int, "training steps of the model that repeats; 0: none"] = 300
    part: Annotated[Part, "which documents blocks are from"] = "heldout"
    noise: Annotated[float, "of planted heads"] = 0.05
    text_contexts: Annotated[int, "contexts from which blocks are drawn"] = 256
    seeds: Annotated[tuple[int, ...], "of prompts, plantings and SAEs"] = (0, 1, 2, 3)

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if not self.seeds or self.prompts < 2 or self.steps < 1:
            yield "there must be a seed, two prompts and a step"
        least = 2 * max(self.prompts, KNOWN_BY)
        if self.text_contexts < least:
            yield f"text_contexts={self.text_contexts} must be at least {least}"
        if not 2 <= self.length < repeating.VOCABULARY:
            yield f"length={self.length} must be from 2 to {repeating.VOCABULARY - 1}"
        if self.length >= self.context:
            yield f"length={self.length} must be below the context, {self.context}"
        yield from self.text_faults()
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
        return self.rise >= max(SHARE * self.rise.max(), LEAST)


def run(config: Config) -> None:
    """Trains, scores, prints, and writes what was found."""
    out = Path(config.out).expanduser()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    rows = [of_planted(config, seed) for seed in config.seeds]
    models = {config.lm: (config.open_lm(), of_text(config))}
    losses: list[float] = []
    if config.repeating:
        print("Training a model to repeat ...", flush=True)
        model, losses = repeating.train(steps=config.repeating, length=config.length)
        models = {"trained to repeat": (model, at_random(config))} | models
    shown, of_heads = {}, {}
    for name, (lm, blocks) in models.items():
        known, scores, found = of_model(config, name, lm, blocks)
        shown[name] = (known.attention, scores)
        rows += found
        of_heads[name] = known._asdict() | {"score": scores}
    text = in_columns(rows)
    record = {
        "rows": rows,
        "heads": {n: plain(one) for n, one in of_heads.items()},
        "repeating_loss": losses[-1:],
    }
    leave_found("circuits", config, text, record)
    picture = out / "figures" / "circuits.png"
    drawn = {
        name: [r for r in rows if r["model"] == name and r["truth"] != "ablation"]
        for name in ("planted vectors", *models)
    }
    drawing.save(circuits_figure(shown, drawn), picture)
    leave_page(
        config,
        title="Circuits by discrete codes",
        summary=f"Language model: {config.lm}. {config.prompts} prompts of each kind.",
        figures=[(picture, CAPTION)],
        notes={"Heads and pairs of the circuit": text},
    )


def of_text(config: Config) -> Blocks:
    """Blocks of text, from anywhere in it."""
    tokenizer, packing = config.open_tokenizer(), config.packing(repeat=False)
    text = HeldOut.read(
        config.open_documents(), tokenizer, packing, config.text_contexts
    ).tokens

    def blocks(rng: np.random.Generator, n: int) -> np.ndarray:
        row = rng.permutation(len(text))[:n]
        at = rng.integers(1, text.shape[1] - config.length + 1, n)
        return text[row[:, None], at[:, None] + np.arange(config.length)]

    return blocks


def at_random(config: Config) -> Blocks:
    """Blocks of random tokens."""
    return lambda rng, n: repeating.blocks(rng, n, config.length)


def contrast(
    lm: Any, blocks: Blocks, rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with a block twice, and with the same last block after another one."""
    both = blocks(rng, 2 * n)
    block, other = both[:n], both[n:]
    bos = lm.config.bos_token_id
    return repeating.after(block, block, bos), repeating.after(other, block, bos)


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
    config: Config, name: str, lm: Any, blocks: Blocks
) -> tuple[Known, Float[np.ndarray, " H"], list[dict[str, Any]]]:
    """What is known of a model's heads, their mean scores, and a row for each seed."""
    length = config.length
    known = known_of(lm, blocks, length)
    rows, scores = [], []
    for seed in config.seeds:
        rng = np.random.default_rng((seed, 1))
        pair = contrast(lm, blocks, rng, config.prompts)
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


def known_of(lm: Any, blocks: Blocks, length: int) -> Known:
    """By attention, and by putting means in the place of heads one by one."""
    tokens, other = contrast(lm, blocks, np.random.default_rng(0), KNOWN_BY)
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
