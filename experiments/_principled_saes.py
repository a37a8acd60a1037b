"""The SAEs that are held against known attributes; not an experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax
from jaxtyping import Array

from experiments._principled import Row, Trial
from sae_jax.analysis.places import Place, Rows
from sae_jax.analysis.principled import phenomena
from sae_jax.analysis.principled.interpretability import of_values
from sae_jax.analysis.principled.sparse import decomposed
from sae_jax.analysis.principled.supervised import by_least_squares
from sae_jax.evaluation import HeldOut
from sae_jax.fit import train_many
from sae_jax.run.members import Member
from sae_jax.trained import TrainedSAE
from sae_jax.training.recipe import Recipe

TASK, RANDOM, TEXT = "task SAE", "random decoder", "text SAE"
LEAST_SHARE = 0.01  # of the variance; an attribute of less is none there


class FrozenDecoder(Recipe):
    """A recipe that leaves the directions as they were drawn.

    Their gradients still count where all are clipped together.
    """

    def optimiser(
        self, lr: Array | float | None = None
    ) -> optax.GradientTransformation:
        """The chain, with no update of the decoder."""

        def only_decoder(params: Any) -> dict[str, bool]:
            return {name: name == "W_dec" for name in params}

        still = optax.masked(optax.set_to_zero(), only_decoder)
        return optax.chain(super().optimiser(lr), still)


def text_rows(config: Any, lm: Any, tokenizer: Any, places: Sequence[Place]) -> Rows:
    """Rows of the same sites at all tokens of text."""
    text = HeldOut.read(
        config.open_documents(),
        tokenizer,
        config.packing(repeat=False),
        config.contexts,
    )
    found: dict[Place, list[np.ndarray]] = {place: [] for place in places}
    for part in text.passes(config.contexts_per_pass):
        values = lm.run(part.tokens, read=tuple({p.site for p in places})).values
        for place in places:
            rows = np.asarray(values[place.site], np.float32)[part.use]
            found[place].append(rows[:, place.columns(lm, rows.shape[1])])
    return {place: np.concatenate(rows) for place, rows in found.items()}


def trained(
    config: Any, trial: Trial, text: Rows
) -> tuple[dict[str, dict[Place, TrainedSAE]], dict[float, TrainedSAE]]:
    """The SAEs by name and place, and those of rows with one attribute rescaled."""
    frozen = FrozenDecoder(**{n: getattr(config.train, n) for n in _fields(Recipe)})
    task = dict(trial.fit_rows)
    saes = {
        TASK: _fitted(config, task, config.train),
        RANDOM: _fitted(config, task, frozen),
        TEXT: _fitted(config, text, config.train),
    }
    if not config.factors:
        return saes, {}
    place, weakest = trial.places[0], weakest_of(shares(trial))
    dictionary = dictionary_of(trial, by_least_squares, place)
    rescaled = {
        factor: phenomena.scaled(
            dictionary, task[place], trial.fit.values, weakest, factor
        ).astype(np.float32)
        for factor in config.factors
    }
    others = _fitted(config, rescaled, config.train)
    return saes, {1.0: saes[TASK][place], **others}


def _fitted(config: Any, rows: Any, recipe: Recipe) -> dict[Any, TrainedSAE]:
    """One SAE for each array of rows, on the same batches."""
    members = {
        str(key): Member(
            config.sae.make(config.rule, array.shape[1]), str(key), seed=config.seed
        )
        for key, array in rows.items()
    }
    arrays = {str(key): array for key, array in rows.items()}
    found = train_many(
        arrays, members, recipe, batch=config.batch, seed=config.seed, progress=False
    )
    return {key: found[str(key)] for key in rows}


def shares(trial: Trial) -> dict[str, float]:
    """The share of the variance that each attribute moves, at the first place."""
    place = trial.places[0]
    dictionary = dictionary_of(trial, by_least_squares, place)
    return phenomena.shares(dictionary, trial.rows[place], trial.tested.values)


def weakest_of(shares: Mapping[str, float]) -> str:
    """The attribute that moves rows least, of those that move them at all."""
    moving = {name: share for name, share in shares.items() if share >= LEAST_SHARE}
    return min(moving or shares, key=lambda name: shares[name])


def occlusion(trial: Trial, saes: dict[float, TrainedSAE]) -> list[Row]:
    """How well the weakest attribute is told when it is stronger or weaker."""
    if not saes:
        return []
    place, weakest = trial.places[0], weakest_of(shares(trial))
    dictionary = dictionary_of(trial, by_least_squares, place)
    found = []
    for factor, one in sorted(saes.items()):
        rows = phenomena.scaled(
            dictionary, trial.rows[place], trial.tested.values, weakest, factor
        )
        active = decomposed(one, rows).strengths != 0
        told = phenomena.told(of_values(active, trial.tested.values, trial.sizes))
        share = phenomena.shares(dictionary, rows, trial.tested.values)[weakest]
        found.append(
            {
                "attribute": weakest,
                "factor": factor,
                "share": share * factor**2,
                "told": told,
            }
        )
    return found


def dictionary_of(trial: Trial, fit: Any, place: Place) -> Any:
    return fit(trial.fit_rows[place], trial.fit.values, trial.sizes)


def _fields(of: Any) -> list[str]:
    return list(of.__dataclass_fields__)
