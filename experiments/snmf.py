"""Neuron groups of an MLP by semi-nonnegative factorisation, beside an SAE.

After Shafran et al. 2025 (arXiv:2506.10920): the hidden units of one MLP are factored
into groups of few neurons; an SAE of as many features is trained on the same rows. Both
are held against planted groups, against the text (S_CD), and by steering: directions of
both, brought through the MLP's output matrix, are added to what the MLP adds.

Command:  python launch.py --experiment=snmf
Example:  python launch.py --experiment=snmf --lm=gpt2 --layer=8 --k=100 --contexts=256
          --dataset=Skylion007/openwebtext
Leaves:   out/snmf.json, snmf.txt, figures/snmf.png, report.html
Hardware: 2 CPU cores, four minutes of processor time (twenty on a busy machine).
Expected: 6.7 of 8 planted groups found, 0 by an SAE; steering alike, .025 and .027, of
          other features' concepts .015 and .013, by random directions .005 and .003.
Note:     nobody judges: what concept, fluency and success are here is at the top of
          `sae_jax/analysis/concepts.py`, and is not what the paper measures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import sae_jax
from experiments._left import leave_found, leave_page
from experiments._planted_groups import compare
from experiments._snmf_text import K_PLANTED, NAMES, in_columns, known
from sae_jax.analysis import concepts
from sae_jax.analysis.concepts import Steering
from sae_jax.analysis.snmf.factors import encode, factorise, unexplained
from sae_jax.analysis.snmf.levels import recursive, token_codes, tune
from sae_jax.analysis.snmf.starts import Start
from sae_jax.config import ModelConfig, TextConfig
from sae_jax.evaluation import HeldOut
from sae_jax.report import drawing
from sae_jax.report.browser_chunks import token_texts
from sae_jax.report.neuron_groups import groups_figure
from sae_jax.settings import Spec
from sae_jax.text.opening import open_documents
from sae_jax.training.recipe import Recipe

WAYS = ("on", "next")  # tokens that it fires on, and that come next
TEXT = 64  # tokens of a context that is steered
PLANTED_RULE = "topk(k=8)"  # every planted group is on in every row
CAPTION = (
    "Left: planted neuron groups found to a cosine above .95, a point for each seed. "
    "Right: success of steering, of each feature's own concept and of another's "
    "(shuffled), and of random directions."
)


@dataclass
class Config(ModelConfig, TextConfig):
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/snmf"
    layer: Annotated[int, "whose MLP"] = 2
    k: Annotated[int, "groups, and features of the SAE"] = 96
    share: Annotated[float, "of the neurons, how many a group has"] = 0.05
    start: Annotated[Start, "codes that the factorisation starts with"] = "random"
    steps: Annotated[int, "of the factorisation, at most"] = 150
    contexts: Annotated[int, "that are factored and trained on"] = 48
    levels: Annotated[
        tuple[int, ...], "groups of the levels of a recursive one; none: no such"
    ] = (48, 24)
    rule: Annotated[Spec, "of the SAE"] = Spec("topk(k=16)")
    sae_steps: Annotated[int, "training steps of the SAE"] = 1500
    held_out: Annotated[
        int, "contexts of held-out text: half for concepts, half for S_CD"
    ] = 64
    steered: Annotated[int, "features of each that steer"] = 48
    amounts: Annotated[
        tuple[float, ...], "how much is added, in mean norms of what the MLP adds"
    ] = (0.5, 1.0, 2.0, 4.0)
    texts: Annotated[int, "held-out contexts to steer, 64 tokens of each"] = 8
    planted: Annotated[int, "seeds of planted groups"] = 6
    seed: Annotated[int, "of whatever is drawn"] = 0

    @property
    def sites(self) -> tuple[str, str]:
        """Where groups are, and where they are added."""
        return f"mlp_hidden.{self.layer}", f"mlp_out.{self.layer}"

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        yield from self.text_faults()
        yield from self.model_faults(self.sites, self.context)
        for name in ("k", "steps", "contexts", "sae_steps", "texts"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1"
        if self.steered < 2 or self.held_out < 2:
            yield "steered and held_out must be at least 2"
        if not 0 < self.share <= 1:
            yield f"share={self.share} must be above 0 and at most 1"
        if self.part == "heldout":
            yield "part=heldout is what concepts are tested on; factor another part"


class Features(NamedTuple):
    """One method's features: activations on held-out text, and directions."""

    strength: Float[np.ndarray, "N T K"]
    directions: Float[np.ndarray, "K D"]
    scores: dict[str, Any]


def run(config: Config) -> None:
    """Factors, trains, measures, prints, and writes what was found."""
    out = Path(config.out).expanduser()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    planted = [
        compare(seed, PLANTED_RULE, steps=500, sae_steps=300)
        for seed in range(config.planted)
    ]
    lm, tokenizer = config.open_lm(), config.open_tokenizer()
    packing = config.packing(repeat=False)
    fitted = HeldOut.read(config.open_documents(), tokenizer, packing, config.contexts)
    documents = open_documents(config.dataset, part="heldout")
    heldout = HeldOut.read(documents, tokenizer, packing, config.held_out)
    x = jnp.asarray(rows_at(lm, fitted, config.sites[0])[fitted.use])
    print(f"Factoring {len(x):,} rows of {x.shape[1]} neurons ...", flush=True)
    found, levels = features_of(config, lm, x, heldout)
    said = described(config, found, heldout, token_texts(tokenizer))
    steering = steered(config, lm, found, heldout, said)
    rows = {name: one.scores for name, one in found.items()}
    text = in_columns(config, planted, rows, steering, levels)
    record = {
        "planted": planted,
        "scores": rows,
        "steering": steering,
        "levels": levels,
        "features": said,
    }
    leave_found("snmf", config, text, known(record))
    picture = out / "figures" / "snmf.png"
    drawing.save(groups_figure(planted, steering, K_PLANTED), picture)
    leave_page(
        config,
        title=f"Neuron groups of {config.sites[0]}",
        figures=[(picture, CAPTION)],
        notes={"Neuron groups beside an SAE": text},
    )


def rows_at(lm: Any, contexts: HeldOut, site: str) -> Float[np.ndarray, "N T D"]:
    """All values of a site."""
    passes = [
        np.asarray(lm.run(part.tokens, read=(site,)).values[site], np.float32)
        for part in contexts.passes(min(16, len(contexts.tokens)))
    ]
    return np.concatenate(passes)[: len(contexts.tokens)]


def features_of(
    config: Config, lm: Any, x: Any, heldout: HeldOut
) -> tuple[dict[str, Features], list[dict[str, float]]]:
    """Groups and SAE of the same rows; and the errors of the levels."""
    options = {"share": config.share, "start": config.start, "seed": config.seed}
    factors = factorise(x, config.k, steps=config.steps, **options)
    steps = config.sae_steps
    recipe = Recipe(steps=steps, lr=1e-3, warmup=steps // 30, decay="linear")
    sae = sae_jax.train(
        x,
        config.rule,
        n_features=config.k,
        batch=min(512, len(x)),
        recipe=recipe,
        seed=config.seed,
        progress=False,
    )
    held = rows_at(lm, heldout, config.sites[0])
    new = jnp.asarray(held.reshape(-1, held.shape[-1]))
    W_dec = sae.sae.weights(sae.variables).W_dec
    x_hat, codes = sae(new)
    group_codes = encode(new, factors.groups)
    used = heldout.use.reshape(-1)
    size = np.square(held[heldout.use]).sum()
    found = {}
    for name, own, rows, made in (
        ("snmf", factors.groups, group_codes, group_codes @ factors.groups),
        ("sae", W_dec, codes, x_hat),
    ):
        strength = np.asarray(rows, np.float64)
        wrong = np.square(np.asarray(new - made)[used]).sum()
        active = strength[used] > 0.01 * strength[used].max(0)
        found[name] = Features(
            strength.reshape(*heldout.tokens.shape, -1),
            concepts.through(lm, np.asarray(own), *config.sites),
            {
                "neurons": float((np.asarray(own) != 0).sum(1).mean()),
                "error": float(wrong / size),
                "active": float(active.sum(1).mean()),
            },
        )
    levels = []
    if config.levels:
        plain = recursive(x, config.levels, steps=config.steps, **options)
        prefixes = [plain[: depth + 1] for depth in range(len(plain))]
        ways = [("factored", part) for part in prefixes] + [("tuned", tune(x, plain))]
        for way, part in ways:
            error = unexplained(x, token_codes(part), part[-1].groups)
            levels.append({"way": way, "k": len(part[-1].groups), "error": error})
    return found, levels


def described(
    config: Config, found: Mapping[str, Features], heldout: HeldOut, texts: Any
) -> dict[str, list[dict[str, Any]]]:
    """Concepts from the first contexts, S_CD on the others, own and another's."""
    n = len(heldout.tokens) // 2
    first, second = heldout.halves()
    said: dict[str, list[dict[str, Any]]] = {}
    for name, one in found.items():
        words, after = (
            [
                concepts.concept(
                    one.strength[:n, :, j], first.tokens, first.use, ahead=ahead
                )
                for j in range(one.strength.shape[2])
            ]
            for ahead in (0, 1)
        )
        other = concepts.of_others(len(words), seed=config.seed)
        rows = []
        for j, own in enumerate(words):
            strength = np.where(second.use, one.strength[n:, :, j], 0)
            pair = [
                concepts.detection(strength, second.tokens, w, length=16)
                for w in (own, words[other[j]])
            ]
            row = {"feature": j, "on": own.tolist(), "next": after[j].tolist()}
            row |= {f"{way}_texts": [texts[t] for t in row[way]] for way in WAYS}
            rows.append(row | {"s_cd": pair[0], "s_cd_shuffled": pair[1]})
        said[name] = rows
        for score in ("s_cd", "s_cd_shuffled"):
            values = np.array([row[score] for row in rows])
            values = values[~np.isnan(values)]
            one.scores[f"{score}_above_0"] = float((values > 0).mean())
            one.scores[f"{score}_median"] = float(np.median(values))
    return said


def steered(
    config: Config,
    lm: Any,
    found: Mapping[str, Features],
    heldout: HeldOut,
    said: Mapping[str, list[dict[str, Any]]],
) -> dict[str, list[dict[str, float]]]:
    """Mean success by amount: of own concepts, of others', of random directions."""
    site = config.sites[1]
    unit = concepts.mean_length(rows_at(lm, heldout, site)[heldout.use])
    steering = Steering(lm, site, heldout.tokens[-config.texts :, :TEXT])
    rng = np.random.default_rng(config.seed)
    random = rng.normal(size=(config.steered, lm.width(site)))
    results: dict[str, list[dict[str, float]]] = {}
    directions: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}
    for name, one in found.items():
        alive = [row["feature"] for row in said[name] if row["next"]]
        drawn = rng.permutation(alive)[: config.steered]
        words = [np.array(said[name][j]["next"]) for j in drawn]
        directions[name] = (one.directions[drawn], words)
    for amount in config.amounts:
        chance = [steering(row, amount * unit) for row in random]
        for name, (rows, words) in directions.items():
            texts = [steering(row, amount * unit) for row in rows]
            other = concepts.of_others(len(words), seed=config.seed)
            for label, written, asked in (
                (NAMES[name], texts, words),
                (f"{NAMES[name]}, shuffled", texts, [words[j] for j in other]),
                (f"random, {NAMES[name]}'s concepts", chance, words),
            ):
                pairs = zip(written, asked, strict=False)
                scores = [steering.success(*pair) for pair in pairs]
                results.setdefault(label, []).append(
                    {
                        "amount": amount,
                        "concept": float(np.mean([s.concept for s in scores])),
                        "fluency": float(np.mean([s.fluency for s in scores])),
                        "both": float(np.mean([s.both for s in scores])),
                    }
                )
    return results
