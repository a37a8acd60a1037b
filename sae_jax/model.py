"""The sparse autoencoder: a description, and pure functions of its variables."""

import dataclasses
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import checks, codes, start, treatment
from sae_jax.binding import BoundRule
from sae_jax.codes import Codes
from sae_jax.contract import Inputs
from sae_jax.rules import parse
from sae_jax.treatment import Treatment, Undo
from sae_jax.variables import Forward, Output, Variables

DType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class SAE:
    """A sparse autoencoder, or a transcoder, as a description without arrays.

    `pre = (x - b_dec) @ W_enc + b_enc`, `codes = rule(pre, ...)`,
    `x_hat = codes @ W_dec + b_dec`, all in the treated space.

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
    rule: str | BoundRule
    d_out: int | None = None
    treatment: Treatment = "none"
    b_dec_start: start.Start = "zeros"
    centre: bool | None = None
    encoder_bias: bool | None = None
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        faults = [
            checks.value_fault(name, getattr(self, name), hint)
            for name, hint in typing.get_type_hints(SAE).items()
            if name != "rule"
        ]
        for name in ("d_in", "n_features", "d_out"):
            if getattr(self, name) == 0:
                faults.append(f"{name}=0; an SAE needs at least one.")
        if isinstance(self.rule, str):
            try:
                object.__setattr__(self, "rule", parse(self.rule))
            except ValueError as error:
                checks.raise_all([*filter(None, faults), str(error)])
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
    def width_out(self) -> int:
        """Width of the reconstruction."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def param_dtype(self) -> Any:
        """Type of parameters and sums."""
        return jnp.promote_types(jnp.float32, self.dtype)

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name != "rule" and getattr(self, field.name) != field.default
        ]
        return f"SAE({', '.join([*shown, f'rule={self.bound.spec!r}'])})"

    def init(
        self,
        key: Array,
        *,
        sample: Float[Array, "B D_in"] | None = None,
        target_sample: Float[Array, "B D_out"] | None = None,
    ) -> Variables:
        """Fresh variables: decoder rows of norm 1, encoder its transpose, biases 0.

        A `sample` of activations is needed where b_dec starts from data or the
        treatment is "scale"; transcoders then need one of their targets as well.
        The encoder of a transcoder whose widths differ has random unit columns.
        """
        key_matrices, key_rule = jax.random.split(key)
        constants: dict[str, Array] = {}
        b_dec = jnp.zeros(self.width_out, self.param_dtype)
        if self.b_dec_start != "zeros" or self.treatment == "scale":
            sample, target_sample = self._samples(sample, target_sample)
            if self.treatment == "scale":
                constants["scale_in"] = treatment.estimate_scale(sample)
                constants["scale_out"] = treatment.estimate_scale(target_sample)
            treated, _ = self._treat(target_sample, constants.get("scale_out"))
            b_dec = start.centre(self.b_dec_start, treated)
        b_enc = jnp.zeros(self.n_features, self.param_dtype)
        W_enc, W_dec = start.matrices(
            key_matrices, self.d_in, self.n_features, self.width_out, self.param_dtype
        )
        params = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        params, state = self.bound.call(self.bound.rule.init, key_rule, params)
        return Variables(params, state, constants)

    def _samples(self, sample: Any, target_sample: Any) -> tuple[Array, Array]:
        target_sample = target_sample if self.is_transcoder else sample
        if sample is None or target_sample is None:
            given = "b_dec_start" if self.b_dec_start != "zeros" else "treatment"
            names = "sample and target_sample" if self.is_transcoder else "sample"
            raise ValueError(
                f"{given}={getattr(self, given)!r} is estimated from data: pass "
                f"init(key, ...) {names}, some thousand rows of activations."
            )
        checks.rows("sample", sample, self.d_in)
        checks.rows("target_sample", target_sample, self.width_out)
        return sample.astype(self.param_dtype), target_sample.astype(self.param_dtype)

    def _treat(self, x: Array, constant: Array | None) -> tuple[Array, Undo]:
        x = x.astype(self.param_dtype)
        if self.treatment == "standardise":
            return treatment.standardise(x)
        if self.treatment == "scale":
            assert constant is not None
            return treatment.scale(x, constant)
        return treatment.no_treatment(x)

    def forward(
        self,
        variables: Variables,
        x: Float[Array, "B D_in"],
        *,
        target: Float[Array, "B D_out"] | None = None,
        grad_x: Float[Array, "B D_in"] | None = None,
        mask: Array | None = None,
        key: Array | None = None,
        step: Array | int = 0,
        train: bool = False,
        knob: Array | float | None = None,
    ) -> Forward:
        """One pass with everything that training looks at.

        `knob` replaces the value of the rule's knob and may be traced.
        """
        rule = self.bound.rule
        checks.rows("x", x, self.d_in)
        if target is not None and not self.is_transcoder:
            raise ValueError("An autoencoder takes no target; transcoders set d_out.")
        checks.beside("target", target, self.width_out, x)
        checks.beside("grad_x", grad_x, self.d_in, x)
        checks.mask(mask, x)
        if train:
            self._check_training(target, grad_x, key)
        treated, undo = self._treat(x, variables.constants.get("scale_in"))
        aim, undo_aim = treated, undo
        if self.is_transcoder and target is not None:
            aim, undo_aim = self._treat(target, variables.constants.get("scale_out"))
        elif self.is_transcoder:
            no_rows = jnp.zeros((1, self.width_out), x.dtype)
            aim, undo_aim = self._treat(no_rows, variables.constants.get("scale_out"))
        if grad_x is not None:  # d loss / d treated = (d loss / d x) (d x / d treated)
            grad_x = grad_x.astype(self.param_dtype) * undo.factor

        weights = self.bound.call(rule.weights, variables.params, variables.state)
        centre = rule.centres if self.centre is None else self.centre
        centre = centre and not self.is_transcoder
        bias = rule.reads_b_enc if self.encoder_bias is None else self.encoder_bias
        b_pre = weights.b_dec if centre else jnp.zeros(self.d_in, self.param_dtype)
        b_enc = weights.b_enc if bias else jnp.zeros_like(weights.b_enc)
        dtype = jnp.dtype(self.dtype)
        encoder = codes.encoder_product(treated, weights.W_enc, b_enc, b_pre, dtype)
        inputs = Inputs(treated, encoder, weights, aim, grad_x, mask, key, step)

        turned = {} if knob is None else {rule.knob: knob}
        encoded = self.bound.call(
            rule.encode,
            inputs,
            variables.params,
            variables.state,
            **{"train": train, **turned},
        )
        active = codes.astype(encoded.codes, dtype)
        scored = self.bound.call(rule.reconstructions, active, weights, dtype, **turned)
        return Forward(
            x_hats=scored.x_hats,
            coefficients=scored.coefficients,
            codes=active,
            state=encoded.state,
            penalties=encoded.penalties,
            encoder=encoder,
            weights=weights,
            target=aim,
            undo=undo_aim,
        )

    def _check_training(self, target, grad_x, key) -> None:
        """Checks that training has what it needs."""
        rule = self.bound.rule
        if self.is_transcoder and target is None:
            raise ValueError(f"A transcoder trains on a target [rows, {self.d_out}].")
        if "grad_x" in rule.needs and grad_x is None:
            raise ValueError(
                f"{rule.name} trains on gradients of the model's loss: give the batch "
                f"a 'grad' beside 'x', of the same shape."
            )
        if "key" in rule.needs and key is None:
            raise ValueError(f"{rule.name} draws random numbers: pass a key.")

    def encode(
        self,
        variables: Variables,
        x: Float[Array, "B D_in"],
        *,
        grad_x: Float[Array, "B D_in"] | None = None,
    ) -> Codes:
        """The codes `[B, F]` of each row, as in evaluation; dense or sparse."""
        return self.forward(variables, x, grad_x=grad_x).codes

    def decode(
        self,
        variables: Variables,
        active: Codes,
        *,
        like: Float[Array, "B D_out"] | None = None,
    ) -> Float[Array, "B D_out"]:
        """The reconstruction of codes, in the units of the activations.

        Under treatment "standardise" it takes the rows that the codes came from,
        `like`, to put their mean and spread back.
        """
        if self.treatment == "standardise" and like is None:
            raise ValueError(
                "treatment='standardise' needs decode(..., like=x): the rows whose "
                "mean and spread are put back."
            )
        if like is None:
            like = jnp.zeros((1, self.width_out), self.param_dtype)
        else:
            checks.beside("like", like, self.width_out, codes.strengths(active))
        _, undo = self._treat(like, variables.constants.get("scale_out"))
        weights = self.bound.call(
            self.bound.rule.weights, variables.params, variables.state
        )
        x_hat = codes.decode(active, weights.W_dec, jnp.dtype(self.dtype))
        return undo(x_hat + weights.b_dec)

    def apply(self, variables: Variables, x: Float[Array, "B D_in"]) -> Output:
        """Reconstruction and codes, as in evaluation; `x_hat` has the type of `x`."""
        out = self.forward(variables, x)
        return Output(out.undo(out.x_hats[-1]).astype(x.dtype), out.codes)
