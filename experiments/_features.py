"""What a report shows of features: a catalogue to browse, and steered text."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sae_jax.evaluation import Evaluator
from sae_jax.evaluation.catalogue import Catalogue, catalogue
from sae_jax.evaluation.steering import ablate, clamp
from sae_jax.lm.generate import generate
from sae_jax.report.browser import Browser, Points
from sae_jax.report.browser_chunks import token_texts
from sae_jax.trained import TrainedSAE

PROMPT, NEW = 24, 32  # tokens
OFTEN = 0.05  # features that fire on more rows steer everything alike
SELDOM = 8  # rows; a feature seen less often is not known well enough


class Shown(NamedTuple):
    """What `write_page` takes, each by name of the SAE."""

    browsers: dict[str, Browser]
    zf: dict[str, Points]
    steered: dict[str, dict[int, list[tuple[str, str]]]]


def features(
    saes: Mapping[str, TrainedSAE],
    evaluator: Evaluator,
    tokenizer: Any,
    *,
    n_steered: int,
) -> Shown:
    """Looks into the features of SAEs, on the text that they are evaluated on."""
    shown, texts = Shown({}, {}, {}), token_texts(tokenizer)
    for name, one in saes.items():
        site, target = one.about["site"], one.about.get("target")
        found = catalogue(
            evaluator.lm,
            one.sae,
            one.variables,
            site,
            evaluator.heldout,
            target_site=target,
        )
        firings = found.firings
        shown.browsers[name] = Browser(found, texts)
        shown.zf[name] = Points(firings.norm_z, firings.norm_f, firings.tokens, texts)
        if not one.sae.is_transcoder:  # which has no features of the site it reads
            shown.steered[name] = {
                feature: samples(one, found, feature, evaluator, tokenizer)
                for feature in worth_steering(found)[:n_steered]
            }
    return shown


def worth_steering(found: Catalogue) -> list[int]:
    """Features that fire neither always nor hardly ever, the strongest first."""
    n_rows = found.firings.use.sum()
    fit = (found.density <= OFTEN) & (found.density * n_rows >= SELDOM)
    order = np.argsort(-found.strength, kind="stable")
    return [int(feature) for feature in order if fit[feature]]


def samples(
    one: TrainedSAE,
    found: Catalogue,
    feature: int,
    evaluator: Evaluator,
    tokenizer: Any,
) -> list[tuple[str, str]]:
    """How the model goes on where the feature is raised, and where it is taken away.

    Raised after the beginning of the first held-out context, taken away after the
    tokens that excite it most. The likeliest token is taken each time.
    """
    tokens, site = found.firings.tokens, one.about["site"]
    length = min(PROMPT, tokens.shape[1], evaluator.lm.context - NEW)
    context, peak = divmod(int(found.examples[feature, 0]), tokens.shape[1])
    own = tokens[context, max(0, peak + 1 - length) : peak + 1]
    high = float(found.highest[feature])

    first = tokens[0, :length]
    # Together, so that the model is compiled for one length.
    prompts = [first.tolist(), own.tolist()]
    plain, held, held_twice, without = (
        [
            tokenizer.decode(new)
            for new in generate(evaluator.lm, prompts, NEW, write=write)
        ]
        for write in (
            {},
            {site: clamp(one, [feature], high)},
            {site: clamp(one, [feature], 2 * high)},
            {site: ablate(one, [feature])},
        )
    )
    return [
        ("prompt", tokenizer.decode(first)),
        ("goes on with", plain[0]),
        (f"held at {high:.3g}, its highest", held[0]),
        (f"held at {2 * high:.3g}", held_twice[0]),
        ("its strongest example", tokenizer.decode(own)),
        ("goes on with", plain[1]),
        ("without the feature", without[1]),
    ]
