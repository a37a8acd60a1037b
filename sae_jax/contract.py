"""The contract of a sparsity rule.

A rule answers one question: which features are active, and how strongly, for these
rows? It is a record, `Rule`, around one pure function:

    encode(inputs, params, state, *, train, **hyperparameters) -> Encoded

Most rules are lifted from something smaller. `from_pre` lifts a function of the
pre-activations, `from_selection` one that says only *which* features stay on (values,
sparse storage and sparse gradients then come from the package).

A hyperparameter is a keyword-only argument, with type and default, of whichever of
the rule's functions reads it. Annotated as `float | Array` or `int | Array` it may be a
traced value, as schedules and ensembles need: they move k inside one compiled program.
Two kinds of keyword-only argument are not hyperparameters: `train`; and `<name>_max`,
the static ceiling of hyperparameter `<name>`, which the package fills in, since shapes
cannot follow a traced value.

What the rest of the package wants to know of a rule is a field of its record; nothing
outside a rule's file names it.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Literal

from jaxtyping import Array, Bool

from sae_jax import checks, products, registry, select
from sae_jax.codes import Codes
from sae_jax.counterpart import Counterpart
from sae_jax.records import (
    Encoded,
    Inputs,
    Params,
    Penalty,
    Reconstructions,
    State,
    Weights,
)

__all__ = [
    "RULES",
    "Encoded",
    "Inputs",
    "Need",
    "Params",
    "Penalty",
    "Reconstructions",
    "Rule",
    "State",
    "Weights",
    "budget_faults",
    "from_pre",
    "from_selection",
    "keywords",
    "no_faults",
    "plain_fold",
    "plain_init",
    "plain_reconstructions",
    "plain_weights",
    "register",
]

Need = Literal["key", "grad_x", "autoencoder"]


def plain_init(key: Array, params: Params) -> tuple[Params, State]:
    """No learned extras, no memory."""
    return params, {}


def plain_weights(params: Params, state: State) -> Weights:
    """The four parameters as they are."""
    return Weights(params["W_enc"], params["b_enc"], params["W_dec"], params["b_dec"])


def plain_reconstructions(
    active: Codes, weights: Weights, dtype: Any
) -> Reconstructions:
    """One reconstruction, from all features."""
    x_hat = products.decode(active, weights.W_dec, dtype) + weights.b_dec
    return Reconstructions([x_hat], [1.0])


def plain_fold(params: Params, scale_in: Array, scale_out: Array) -> Params:
    """Moves the constants of the "scale" treatment into the four parameters.

    `pre` stays as it is, and so do the codes of a rule that reads nothing else of x,
    or reads norms of x only against one another.
    """
    return {
        **params,
        "W_enc": params["W_enc"] * scale_in,
        "W_dec": params["W_dec"] / scale_out,
        "b_dec": params["b_dec"] / scale_out,
    }


def no_faults(n_features: int) -> Iterable[str]:
    """Any finite, non-negative hyperparameters will do."""
    return ()


@dataclasses.dataclass(frozen=True, eq=False)  # one of a kind, compared by identity
class Rule:
    """All that the package knows of a sparsity rule.

    Attributes:
      name: file name, flag value and checkpoint key alike.
      paper: where it comes from.
      decides: what it decides by, in a few words, for the table of rules.
      encode: the rule itself.
      example: hyperparameters for a small SAE (16 wide, 64 features) in tests.
      knob: the hyperparameter that moves sparsity; schedules and sweeps turn it.
      knob_raises_l0: whether more of the knob means more active features; None where
        that depends on the data, so that nothing can steer by it.
      init: adds learned extras to the parameters, and makes the state: memory that
        no gradient updates.
      weights: the four arrays from parameters and state; tied dictionaries and
        adapted biases override it.
      reconstructions: the reconstructions that are scored; nested ones override it.
      fold: the same codes without the "scale" treatment, by other parameters; None
        where there are none such (a tied dictionary must keep its norm).
      lengths: hyperparameters in units of treated inputs; folding scales them too.
      export: what it is to other libraries, a function (params, state, *,
        hyperparameters) -> `Counterpart`; or a sentence on why it has none.
      faults: sentences on what is wrong with these hyperparameters at this width.
      budget: the hyperparameter that bounds the mean number of active features.
      needs: what it cannot do without: "key" (random numbers in training), "grad_x"
        (gradients of the model's loss in training), "autoencoder" (not a transcoder).
      iterative: it encodes by one product after another, as many as its budget says;
        most take one.
      without_gradient: how one that needs "grad_x" chooses features of rows that come
        without it, as new text does; says so where that happens.
      couples_batch: in training, a row's codes depend on other rows.
      signed: codes may be negative.
      reads_b_enc: whether pre-activations include the encoder bias.
      centres: whether the encoder sees `x - b_dec`.
      aux_k: whether its literature trains it with an auxiliary dead-feature loss;
        the default of training.
      underused: `(state, **hyperparameters) -> bool [F]`, features that this loss
        revives besides the dead ones, seen from the state before a step; None where
        there are none such, which costs nothing.
    """

    name: str
    paper: str
    decides: str
    encode: Callable[..., Encoded]
    example: Mapping[str, Any]
    knob: str
    knob_raises_l0: bool | None = True
    init: Callable[..., tuple[Params, State]] = plain_init
    weights: Callable[..., Weights] = plain_weights
    reconstructions: Callable[..., Reconstructions] = plain_reconstructions
    fold: Callable[[Params, Array, Array], Params] | None = plain_fold
    lengths: tuple[str, ...] = ()
    export: Callable[..., Counterpart] | str = "Its record declares no counterpart."
    faults: Callable[..., Iterable[str]] = no_faults
    budget: str | None = None
    needs: frozenset[Need] = frozenset()
    iterative: bool = False
    without_gradient: str = ""
    couples_batch: bool = False
    signed: bool = False
    reads_b_enc: bool = True
    centres: bool = True
    aux_k: bool = True
    underused: Callable[..., Bool[Array, " F"]] | None = None

    def __post_init__(self) -> None:
        known = self.hyperparameters()
        named = {self.knob, *self.example, self.budget or self.knob, *self.lengths}
        named |= {parameter.name for parameter in keywords(self.faults)}
        if callable(self.export):
            named |= {parameter.name for parameter in keywords(self.export)}
        faults = [
            checks.unknown("hyperparameter", name, known)
            for name in sorted(named - set(known))
        ]
        if ("grad_x" in self.needs) != bool(self.without_gradient):
            faults.append(
                "needs 'grad_x' and without_gradient, which says how rows are encoded "
                "that come without it, go together."
            )
        checks.raise_all(f"Rule {self.name}: {fault}" for fault in faults)

    def hyperparameters(self) -> dict[str, tuple[Any, Any]]:
        """Type and default of each hyperparameter, by name."""
        found: dict[str, tuple[Any, Any]] = {}
        functions = (
            *(self.encode, self.init, self.weights, self.reconstructions),
            *([] if self.underused is None else [self.underused]),
        )
        for function in functions:
            hints = typing.get_type_hints(function)
            for parameter in keywords(function):
                entry = (hints.get(parameter.name), parameter.default)
                if found.setdefault(parameter.name, entry) != entry:
                    raise ValueError(
                        f"Rule {self.name} declares {parameter.name} twice and "
                        f"differently; give it one type and one default."
                    )
        return {
            name: entry
            for name, entry in found.items()
            if name != "train"
            and not (name.endswith("_max") and name.removesuffix("_max") in found)
        }

    @property
    def traced(self) -> tuple[str, ...]:
        """The hyperparameters that may be traced values."""
        hints = self.hyperparameters().items()
        return tuple(n for n, (hint, _) in hints if Array in typing.get_args(hint))

    def __repr__(self) -> str:
        return f"<rule {self.name}: {self.decides}>"


def keywords(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The keyword-only parameters of a function, where hyperparameters live."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is p.KEYWORD_ONLY]


def from_pre(function: Callable[..., Codes]) -> Callable[..., Encoded]:
    """Lifts `function(pre, *, hyperparameters) -> codes` into a rule's `encode`."""

    @wraps(function)
    def encode(inputs, params, state, **hp):
        return Encoded(function(inputs.pre, **hp), state, {})

    return encode


def from_selection(
    function: Callable[..., select.Selection], *, signed: bool = False
) -> Callable[..., Encoded]:
    """Lifts `function(inputs, *, hyperparameters) -> selection` into `encode`.

    Codes are `relu(pre)` on the selected features, or `pre` itself where `signed`.
    """

    @wraps(function)
    def encode(inputs, params, state, **hp):
        chosen = function(inputs, **hp)
        active = select.keep(inputs.encoder, chosen, signed=signed)
        return Encoded(active, state, {})

    return encode


RULES: registry.Table[Rule] = registry.Table("rule")


def register(rule: Rule) -> Rule:
    """Makes a rule known under its name: to spec strings, tests, tables and sweeps."""
    return RULES.register(rule.name, rule)


def budget_faults(n_features: int, *, k: float) -> Iterable[str]:
    """A budget of k features per row must be positive and fit the dictionary."""
    if not 0 < k <= n_features:
        yield f"k={k} must be above 0 and at most n_features={n_features}."
