"""What an SAE is made like: sizes, rule, options. A description without arrays."""

import dataclasses
import typing
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from sae_jax import checks, start
from sae_jax.binding import BoundRule, bind
from sae_jax.contract import Rule
from sae_jax.rules import parse
from sae_jax.treatment import Treatment

DType = Literal["float32", "bfloat16", "float64"]
Made = TypeVar("Made", bound="Architecture")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes, rule and options of an autoencoder or transcoder.

    Attributes:
      d_in: width of the activations.
      n_features: size F of the dictionary.
      rule: the sparsity rule, such as `"topk(k=32)"`.
      d_out: width of the target; given for transcoders only, which never centre.
      treatment: what is done to rows first: "none", "standardise" or "scale".
      b_dec_start: where b_dec starts: "zeros", or "mean" or "geometric_median" of a
        sample.
      centre: whether the encoder sees `x - b_dec`; None: as the rule does.
      encoder_bias: whether b_enc is added; None: as the rule does.
      dtype: type of the operands of matrix products. Parameters, sums and optimiser
        stay float32 under "bfloat16".
    """

    d_in: int
    n_features: int
    rule: str | Rule | BoundRule
    d_out: int | None = None
    treatment: Treatment = "none"
    b_dec_start: start.Start = "zeros"
    centre: bool | None = None
    encoder_bias: bool | None = None
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        faults = [
            checks.value_fault(name, getattr(self, name), hint)
            for name, hint in typing.get_type_hints(Architecture).items()
            if name != "rule"
        ]
        for name in ("d_in", "n_features", "d_out"):
            if getattr(self, name) == 0:
                faults.append(f"{name}=0; an SAE needs at least one.")
        try:
            rule = bind(self.rule, {}) if isinstance(self.rule, Rule) else self.rule
            rule = parse(rule) if isinstance(rule, str) else rule
            object.__setattr__(self, "rule", rule)
        except ValueError as error:
            faults.append(str(error))
        else:
            if not isinstance(rule, BoundRule):
                faults.append(f"rule={rule!r} must be a spec string or a Rule.")
        checks.raise_all(filter(None, faults))  # the sizes, before they are used
        checks.raise_all([*self.bound.faults(self.n_features), *self._mismatches()])

    def _mismatches(self) -> list[str]:
        """Options that are good alone and do not go together."""
        faults = []
        rule = self.bound.rule
        if self.is_transcoder and "autoencoder" in rule.needs:
            faults.append(
                f"{rule.name} reads the vector that it reconstructs, which a "
                f"transcoder (d_out={self.d_out}) does not see; leave d_out out, or "
                f"take a rule without this need."
            )
        if self.is_transcoder and self.treatment == "standardise":
            faults.append(
                "treatment='standardise' puts the row's own mean and spread back, "
                "which a transcoder does not know for its target; use 'scale'."
            )
        if self.d_in == 1 and self.treatment == "standardise":
            faults.append("treatment='standardise' needs rows wider than 1.")
        if self.is_transcoder and self.centre:
            faults.append(
                "centre=True subtracts b_dec, which lives in a transcoder's output "
                "space, from its input; leave centre out."
            )
        if self.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            faults.append(
                "dtype='float64' needs jax.config.update('jax_enable_x64', True) first."
            )
        return faults

    @property
    def bound(self) -> BoundRule:
        """The rule with its hyperparameters."""
        assert isinstance(self.rule, BoundRule)  # __post_init__ parsed it
        return self.rule

    @property
    def is_transcoder(self) -> bool:
        """Whether the target is something other than the input."""
        return self.d_out is not None

    @property
    def centred(self) -> bool:
        """Whether the encoder sees `x - b_dec`."""
        centre = self.bound.rule.centres if self.centre is None else self.centre
        return centre and not self.is_transcoder

    @property
    def biased(self) -> bool:
        """Whether pre-activations include b_enc."""
        rule = self.bound.rule
        return rule.reads_b_enc if self.encoder_bias is None else self.encoder_bias

    @property
    def width_out(self) -> int:
        """Width of the reconstruction."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def param_dtype(self) -> Any:
        """Type of parameters and sums."""
        return jnp.promote_types(jnp.float32, self.dtype)

    def up_to(self: Made, ceiling: float) -> Made:
        """The same SAE, with shapes made for values of the knob up to `ceiling`."""
        if self.bound.rule.budget == self.bound.rule.knob:
            ceiling = min(ceiling, self.n_features)
        bound = dataclasses.replace(self.bound, ceiling=max(ceiling, self.bound.top))
        return dataclasses.replace(self, rule=bound)

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name != "rule" and getattr(self, field.name) != field.default
        ]
        shown.append(f"rule={self.bound.spec!r}")
        return f"{type(self).__name__}({', '.join(shown)})"
