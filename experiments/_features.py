"""What a report shows of features: a catalogue to browse, and steered text."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sae_jax.analysis.interpretation.labels import label, summary
from sae_jax.evaluation import Evaluator
from sae_jax.evaluation.catalogue import Catalogue, catalogue
from sae_jax.evaluation.steering import ablate, clamp
from sae_jax.lm.generate import choosing_positions, generate
from sae_jax.report.browser import Browser, Points
from sae_jax.report.browser_chunks import token_texts
from sae_jax.trained import TrainedSAE

PROMPT, NEW = 24, 32  # tokens
FAR = 4  # its highest often changes nothing of the likeliest tokens
OFTEN = 0.05  # features that fire on more rows steer everything alike
SELDOM = 8  # rows; a feature seen less often is not known well enough


class Shown(NamedTuple):
    """What `write_page` takes, each by name of the SAE."""

    browsers: dict[str, Browser]
    zf: dict[str, Points]
    steered: dict[str, dict[int, list[tuple[str, str]]]]

    def labelled(self) -> str:
        """What the labels of the features are worth."""
        return "\n\n".join(
            f"{name}\n{summary(browser.labels)}"
            for name, browser in self.browsers.items()
            if browser.labels is not None
        )


def features(
    saes: Mapping[str, TrainedSAE],
    evaluator: Evaluator,
    tokenizer: Any,
    *,
    n_steered: int,
) -> Shown:
    """Looks into the features of SAEs, on the text that they are evaluated on.

    One that cannot be looked into (too many firings, for one) is left out, and said: a
    report after hours of training has to come.
    """
    shown, texts = Shown({}, {}, {}), token_texts(tokenizer)
    for name, one in saes.items():
        try:
            found = catalogue(
                evaluator.lm,
                one.sae,
                one.variables,
                one.about["site"],
                evaluator.heldout,
                target_site=one.about.get("target"),
                contexts_per_pass=evaluator.contexts_per_pass,
            )
        except ValueError as error:
            print(f"The features of {name} are not shown: {error}", flush=True)
            continue
        firings = found.firings
        shown.browsers[name] = Browser(found, texts, label(firings, texts))
        shown.zf[name] = Points(firings.norm_z, firings.norm_f, firings.tokens, texts)
        # A transcoder has no features of the site that it reads.
        if not one.sae.is_transcoder and evaluator.lm.context >= PROMPT + NEW:
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
    tokens that excite it most, with BOS before them where their context begins with it.
    What is read of the prompts stays as it is: the first position of a model can be
    unlike all others, and an SAE may never have seen it. The likeliest token is taken
    each time.
    """
    tokens, site = found.firings.tokens, one.about["site"]
    context, peak = divmod(int(found.examples[feature, 0]), tokens.shape[1])
    head = int(tokens[context, 0] == tokenizer.bos_token_id)
    window = tokens[context, head : peak + 1][head - PROMPT :]
    own = np.concatenate([tokens[context, :head], window])
    high = float(found.highest[feature])

    # Together, so that the model is compiled for one length.
    prompts = [tokens[0, :PROMPT].tolist(), own.tolist()]
    where = choosing_positions(prompts, NEW)
    plain, held, far, without = (
        [
            tokenizer.decode(new)
            for new in generate(evaluator.lm, prompts, NEW, write=write)
        ]
        for write in (
            {},
            {site: clamp(one, [feature], high, where=where)},
            {site: clamp(one, [feature], FAR * high, where=where)},
            {site: ablate(one, [feature], where=where)},
        )
    )
    return [
        ("prompt", tokenizer.decode(prompts[0])),
        ("goes on with", plain[0]),
        (f"held at {high:.3g}, its highest", held[0]),
        (f"held at {FAR} times that", far[0]),
        ("its strongest example", tokenizer.decode(prompts[1])),
        ("goes on with", plain[1]),
        ("without the feature", without[1]),
    ]
