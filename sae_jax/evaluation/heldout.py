"""What an SAE leaves of a language model's predictions when it is spliced in.

All losses are means, in nats, over the next tokens of held-out text that are real. At
the used positions the site holds

    loss_clean      what it held
    loss_spliced    the SAE's reconstruction
    loss_zero       zeros
    loss_mean       the mean of what it held at those positions

and elsewhere what it held.

    loss_recovered      = (loss_zero - loss_spliced) / (loss_zero - loss_clean)
    loss_recovered_mean = (loss_mean - loss_spliced) / (loss_mean - loss_clean)

Zeros are the field's custom (SAELens, dictionary_learning). They can be far from all
that the model knows, and then a poor reconstruction has a high share as well; the mean
asks for more. Shares above 1 and below 0 stand as they are.

A loss looks at the one token that came; errors that raise it here and lower it there
cancel. What cannot cancel is the divergence KL(p || q) of the whole prediction, p that
of the clean model and q that of the changed one, over the same places:

    kl_spliced, kl_zero, kl_mean = mean of sum_v p_v (log p_v - log q_v), in nats

It weighs by p, as SAELens and SAEBench do: it costs most to give up what the model held
likely. Their mean counts the last position of each context as well.

SAEs whose rule looks at the gradient of the model's loss have all scores as new text is
encoded, without it. How far their training was from that is the gap to the scores
`NAME_with_gradients` (of `GAP`), of codes chosen with the gradients of the clean model.
These know of the tokens that come next, and what they recover is no fair comparison.

Logits never leave the device, and those of one pass are there at a time: two float32
arrays [contexts * T, vocabulary], and while they are compared (on a CPU) two more.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sae_jax import checks
from sae_jax.evaluation.gathering import Mean, Measurement
from sae_jax.evaluation.measures import Evaluation, ratio
from sae_jax.lm.edits import replace
from sae_jax.lm.sites import Run
from sae_jax.lm.source import Source
from sae_jax.model import SAE
from sae_jax.text.contexts import Packing, contexts
from sae_jax.text.documents import Documents
from sae_jax.variables import Variables

GAP = ("l0", "nmse", "dead", "loss_spliced", "loss_recovered", "kl_spliced")
WITH_GRADIENTS = "_with_gradients"
Rows: TypeAlias = Float[Array, "BT D"]


class HeldOut(NamedTuple):
    """A fixed set of contexts.

    `real` is false at padding; `use` also where activations are left alone.
    """

    tokens: Int[np.ndarray, "N T"]
    real: Bool[np.ndarray, "N T"]
    use: Bool[np.ndarray, "N T"]

    @classmethod
    def read(
        cls, documents: Documents, tokenizer: Any, packing: Packing, n_contexts: int
    ) -> "HeldOut":
        """The first contexts of the text, which is read once, whatever `packing` says.

        A text that is repeated would count some of its contexts twice.
        """
        if n_contexts < 1:
            raise ValueError(f"n_contexts={n_contexts}; at least one is needed.")
        once = contexts(documents, tokenizer, packing._replace(repeat=False))
        taken = list(islice(once, n_contexts))
        if len(taken) < n_contexts:
            raise ValueError(
                f"n_contexts={n_contexts}, and the held-out text has {len(taken)} of "
                f"{packing.length} tokens; ask for no more, or for shorter ones."
            )
        return cls(
            np.stack([context.tokens for context in taken]),
            np.stack([context.real for context in taken]),
            np.stack([context.use for context in taken]),
        )

    def faults(self, contexts_per_pass: int) -> Iterator[str]:
        """Why nothing can be evaluated on these contexts."""
        if contexts_per_pass < 1:
            yield f"contexts_per_pass={contexts_per_pass} must be above 0."
        if not self.use.any():
            yield (
                "No position of the held-out contexts is used: all are BOS, padding "
                "or skipped. Read more of them, or lower the packing's skip."
            )

    def halves(self) -> tuple["HeldOut", "HeldOut"]:
        """The first contexts and the last; to fit on some tokens and score on others.

        Not every other one: where a document goes on from a context into the next, at
        most one is in both halves.
        """
        n = len(self.tokens) // 2
        return HeldOut(*(a[:n] for a in self)), HeldOut(*(a[n:] for a in self))

    def passes(self, n: int) -> Iterator["HeldOut"]:
        """`n` contexts at a time; the last ones are joined by padding up to `n`."""
        missing = -len(self.tokens) % n
        whole = [np.pad(array, ((0, missing), (0, 0))) for array in self]
        for start in range(0, len(whole[0]), n):
            yield HeldOut(*(array[start : start + n] for array in whole))


# From the rows of a pass, by site, and its contexts: rows under names.
Make: TypeAlias = Callable[[dict[str, Rows], HeldOut], Mapping[str, Rows]]


class Baseline(NamedTuple):
    """What does not depend on the SAE: the mean of a site, and scores of ablations."""

    mean: Float[np.ndarray, " D"]
    scores: dict[str, float]


class Evaluator:
    """Splices SAEs into a language model, and measures them on the rows of the site.

    `lm` is any source. What a site needs apart from the SAE is computed once.
    """

    def __init__(self, lm: Source, heldout: HeldOut, *, contexts_per_pass: int = 16):
        checks.raise_all(heldout.faults(contexts_per_pass))
        self.lm, self.heldout = lm, heldout
        self.contexts_per_pass = contexts_per_pass
        self._passes = list(heldout.passes(contexts_per_pass))
        self._baselines: dict[str, Baseline] = {}

    def __call__(
        self,
        sae: SAE,
        variables: Variables,
        site: str,
        *,
        target_site: str | None = None,
    ) -> Evaluation:
        """The scores of `measures`, and those of the top of this file.

        A transcoder reads `site`, and what it makes of it replaces `target_site`.
        """
        require_target(sae, target_site)
        found = self._measured(sae, variables, site, target_site)
        if "grad_x" not in sae.bound.rule.needs:
            return found
        best = self._measured(sae, variables, site, target_site, gradients=True).scores
        beside = {name + WITH_GRADIENTS: best[name] for name in GAP}
        return found._replace(scores={**found.scores, **beside})

    def _measured(
        self,
        sae: SAE,
        variables: Variables,
        site: str,
        target_site: str | None,
        *,
        gradients: bool = False,
    ) -> Evaluation:
        """All scores, of codes that are chosen with or without gradients."""
        aim = site if target_site is None else target_site
        baseline = self._baseline(aim)
        measurement = Measurement(sae, variables, baseline.mean)

        def spliced(rows: dict[str, Rows], part: HeldOut) -> dict[str, Rows]:
            x_hat = measurement.add(
                rows[site],
                target=rows[aim] if target_site is not None else None,
                grad_x=self._gradients(part, site) if gradients else None,
                mask=part.use.reshape(-1),
            )
            return {"spliced": x_hat}

        scores = baseline.scores | self.splice(aim, spliced, read=(site,))
        for name, ruin in (("", "loss_zero"), ("_mean", "loss_mean")):
            scores[f"loss_recovered{name}"] = ratio(
                scores[ruin] - scores["loss_spliced"],
                scores[ruin] - scores["loss_clean"],
            )
        evaluation = measurement.finish()
        return evaluation._replace(scores={**evaluation.scores, **scores})

    def splice(
        self, site: str, make: Make, *, read: tuple[str, ...] = ()
    ) -> dict[str, float]:
        """`loss_clean`, and loss and divergence with other rows at a site.

        `make` is given the rows of a pass, of `site` and of those in `read`, and the
        contexts that they are of. Each array that it gives is put at `site` by itself;
        its name stands in `loss_NAME` and `kl_NAME`.
        """
        loss, totals = 0.0, dict[str, np.ndarray]()
        for part in self._passes:
            clean = self._clean(part, *read, site)
            rows = {s: _rows(value) for s, value in clean.values.items()}
            loss += _summed(clean.losses, part)
            for name, new in make(rows, part).items():
                value = new.reshape(clean.values[site].shape)
                changed = self._changed(part, clean, site, value)
                totals[name] = totals.get(name, np.zeros(2)) + changed
        scores = {"loss_clean": self._mean(loss)}
        for name, (total, divergence) in totals.items():
            scores[f"loss_{name}"] = self._mean(float(total))
            scores[f"kl_{name}"] = self._mean(float(divergence))
        return scores

    def _baseline(self, site: str) -> Baseline:
        if site not in self._baselines:
            gathered = Mean()
            for part in self._passes:
                value = self._clean(part, site).values[site]
                gathered.add(_rows(value), mask=part.use.reshape(-1))
            mean = gathered.finish()
            zeros = jnp.zeros_like(_rows(value))
            # As large as a reconstruction, so that the model is compiled once for all.
            ruins = {"zero": zeros, "mean": zeros + jnp.asarray(mean, value.dtype)}
            scores = self.splice(site, lambda *_: ruins)
            self._baselines[site] = Baseline(mean, scores)
        return self._baselines[site]

    def _clean(self, part: HeldOut, *sites: str) -> Run:
        """The model as it is, read at these sites; one program for each set of them."""
        read = tuple(dict.fromkeys(sites))
        return self.lm.run(part.tokens, read=read, logits=True, losses=True)

    def _gradients(self, part: HeldOut, site: str) -> Float[Array, "BT D"]:
        """Those of the summed losses of the clean model."""
        weights = part.real[:, 1:].astype(np.float32)
        _, found = self.lm.gradients(part.tokens, (site,), weights=weights)
        return _rows(found[site])

    def _changed(
        self, part: HeldOut, clean: Run, site: str, value: Float[Array, "B T D"]
    ) -> Float[np.ndarray, "2"]:
        """Summed loss and divergence with `value` at the used positions of the site."""
        edit = replace(value, where=jnp.asarray(part.use))
        run = self.lm.run(part.tokens, write={site: edit}, logits=True, losses=True)
        changes = divergences(clean.logits, run.logits)
        return np.array([_summed(run.losses, part), _summed(changes, part)])

    def _mean(self, total: float) -> float:
        return ratio(total, int(self.heldout.real[:, 1:].sum()))


def require_target(sae: SAE, target_site: str | None) -> None:
    """Refuses a transcoder without the site that it aims at, and the reverse."""
    if sae.is_transcoder != (target_site is not None):
        raise ValueError(
            f"target_site={target_site!r} with {sae!r}: a transcoder needs the site "
            f"that it aims at, and an autoencoder takes none."
        )


def _rows(value: Float[Array, "B T D"]) -> Float[Array, "BT D"]:
    return value.reshape(-1, value.shape[-1])


@jax.jit
def divergences(
    clean: Float[Array, "B T V"], changed: Float[Array, "B T V"]
) -> Float[Array, "B T-1"]:
    """KL(clean || changed) of the prediction of each token but the first."""
    # Logits less their logsumexp would need no arrays of their own; but near -100,
    # where GPT-2's logits are, the result is wrong by twenty times as much.
    log_p, log_q = (
        jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (clean, changed)
    )
    return (jnp.exp(log_p) * (log_p - log_q)).sum(2)[:, :-1]  # the last predicts none


def _summed(per_token: Float[Array, "B _"] | None, part: HeldOut) -> float:
    """The sum over the next tokens that are real."""
    return float(np.asarray(per_token)[part.real[:, 1:]].sum(dtype=np.float64))
