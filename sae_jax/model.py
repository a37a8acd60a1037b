"""The sparse autoencoder: pure functions of its variables."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae_jax import checks, codes, products, start, treatment
from sae_jax.architecture import Architecture
from sae_jax.codes import Codes
from sae_jax.contract import Inputs, Rule, Weights
from sae_jax.products import Encoder
from sae_jax.treatment import Undo
from sae_jax.variables import Forward, Output, Variables


class WithoutGradient(UserWarning):
    """An SAE that was trained with gradients encodes rows without them."""


@functools.cache  # once in a process; JAX makes Python forget what it has said
def say_without_gradient(rule: Rule) -> None:
    """Warns that rows are encoded in another way than in training."""
    warnings.warn(
        f"{rule.name} was trained with gradients of the model's loss and encodes rows "
        f"without them {rule.without_gradient}. Pass grad_x if you have it; an "
        f"Evaluator measures what that changes.",
        WithoutGradient,
        stacklevel=2,
    )


@dataclasses.dataclass(frozen=True, repr=False)
class SAE(Architecture):
    """A sparse autoencoder, or a transcoder: a description, and what can be done by it.

    `pre = (x - b_dec) @ W_enc.T + b_enc`, `codes = rule(pre, ...)`,
    `x_hat = codes @ W_dec + b_dec`, all in the treated space. It holds no arrays: those
    are `Variables`, which `init` makes. Its fields are those of `Architecture`.
    """

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
        The encoder of a transcoder whose widths differ has random unit rows.
        """
        key_matrices, key_rule = jax.random.split(key)
        constants: dict[str, Array] = {}
        b_dec = jnp.zeros(self.width_out, self.param_dtype)
        if self.b_dec_start != "zeros" or self.treatment == "scale":
            sample, target_sample = self._samples(sample, target_sample)
            if self.treatment == "scale":
                constants["scale_in"] = treatment.estimate_scale(sample)
                constants["scale_out"] = treatment.estimate_scale(target_sample)
                checks.scale(constants)
            treated, _ = self._treat(target_sample, constants.get("scale_out"))
            b_dec = start.centre(self.b_dec_start, treated)
        b_enc = jnp.zeros(self.n_features, self.param_dtype)
        W_enc, W_dec = start.matrices(
            key_matrices, self.d_in, self.n_features, self.width_out, self.param_dtype
        )
        params = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        params, state = self.bound.call(self.bound.rule.init, key_rule, params)
        return Variables(params, state, constants)

    def shapes(self) -> Variables:
        """Shapes and types of what `init` makes, without making it."""
        sample = jax.ShapeDtypeStruct((2, self.d_in), jnp.float32)
        target = jax.ShapeDtypeStruct((2, self.width_out), jnp.float32)
        return jax.eval_shape(
            lambda x, y: self.init(jax.random.key(0), sample=x, target_sample=y),
            sample,
            target,
        )

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
        x, target, grad_x = self._checked(x, target, grad_x, mask)
        if train:
            self._check_training(target, grad_x, key)
        elif rule.without_gradient and grad_x is None:
            say_without_gradient(rule)
        if knob is not None and not checks.is_traced(knob) and knob > self.bound.top:
            raise ValueError(f"knob={knob} is above {self.bound.top}; see SAE.up_to.")
        turned = {} if knob is None else {rule.knob: knob}
        treated, undo = self._treat(x, variables.constants.get("scale_in"))
        aim, undo_aim = treated, undo
        if self.is_transcoder and target is not None:
            aim, undo_aim = self._treat(target, variables.constants.get("scale_out"))
        elif self.is_transcoder:
            no_rows = jnp.zeros((1, self.width_out), x.dtype)
            aim, undo_aim = self._treat(no_rows, variables.constants.get("scale_out"))
        if grad_x is not None:  # d loss / d treated = (d loss / d x) (d x / d treated)
            grad_x = grad_x.astype(self.param_dtype) * undo.factor

        weights = self.weights(variables, **turned)
        encoder, dtype = self.encoder(weights, treated), jnp.dtype(self.dtype)
        inputs = Inputs(treated, encoder, weights, aim, grad_x, mask, key, step)

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
            target=None if self.is_transcoder and target is None else aim,
            undo=undo_aim,
        )

    def encoder(self, weights: Weights, treated: Float[Array, "B D_in"]) -> Encoder:
        """The encoder product of rows after their treatment."""
        nothing = jnp.zeros(self.d_in, self.param_dtype)
        b_pre = weights.b_dec if self.centred else nothing
        b_enc = weights.b_enc if self.biased else jnp.zeros_like(weights.b_enc)
        dtype = jnp.dtype(self.dtype)
        return products.encoder_product(treated, weights.W_enc, b_enc, b_pre, dtype)

    def _checked(self, x, target, grad_x, mask) -> Any:
        """Checks the arrays of a batch; rows that do not count become zeros."""
        if target is not None and not self.is_transcoder:
            raise ValueError("An autoencoder takes no target; transcoders set d_out.")
        checks.rows("x", x, self.d_in, mask=mask)
        checks.mask(mask, x)
        checks.beside("target", target, self.width_out, x, mask=mask)
        checks.beside("grad_x", grad_x, self.d_in, x, mask=mask)
        if mask is None:
            return x, target, grad_x
        return tuple(
            None if rows is None else jnp.where(mask[:, None], rows, 0)
            for rows in (x, target, grad_x)
        )

    def weights(self, variables: Variables, **turned: Any) -> Weights:
        """What encodes and decodes, which a rule may make of what is learned.

        `turned` are values of the rule's hyperparameters other than its own.
        """
        weights = self.bound.call(
            self.bound.rule.weights, variables.params, variables.state, **turned
        )
        checks.shape("W_enc", weights.W_enc, (self.n_features, self.d_in))
        checks.shape("W_dec", weights.W_dec, (self.n_features, self.width_out))
        return weights

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
        """The codes `[B, F]` of each row, as in evaluation; dense or sparse.

        `grad_x` is for rules that need it; see `Rule.without_gradient`.
        """
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
        weights = self.weights(variables)
        x_hat = products.decode(active, weights.W_dec, jnp.dtype(self.dtype))
        return undo(x_hat + weights.b_dec)

    def apply(
        self,
        variables: Variables,
        x: Float[Array, "B D_in"],
        *,
        grad_x: Float[Array, "B D_in"] | None = None,
    ) -> Output:
        """Reconstruction and codes, as in evaluation; `x_hat` has the type of `x`."""
        out = self.forward(variables, x, grad_x=grad_x)
        return Output(out.undo(out.x_hats[-1]).astype(x.dtype), out.codes)
