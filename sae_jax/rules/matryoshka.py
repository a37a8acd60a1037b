"""Matryoshka: one code whose prefixes must each reconstruct the input."""

from collections.abc import Iterable
from typing import Any

from sae_jax import codes, over_batch, products
from sae_jax.contract import (
    Reconstructions,
    Rule,
    Weights,
    budget_faults,
    register,
)


def nested(
    active: codes.Codes,
    weights: Weights,
    dtype: Any,
    *,
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    bias_group: bool = False,
) -> Reconstructions:
    """One reconstruction from the first m features, for each prefix length m.

    Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv:2503.17547: `x_hat_g =
    codes[:, :m_g] @ W_dec[:m_g] + b_dec` for m_1 < ... < m_G = F, and the loss is the
    mean over g of `mse(x_hat_g, x)`. Each adds its own slice to the one before it, so
    all of them together cost one decode.

    Differs: their code counts the bias alone as one more group; here that is the option
    `bias_group`. Prefixes are given as fractions of F, by default theirs.
    """
    total = weights.b_dec[None]
    x_hats = [total] if bias_group else []
    edges = [round(fraction * weights.W_dec.shape[0]) for fraction in prefixes]
    for part in products.decode_slices(active, weights.W_dec, edges, dtype):
        total = total + part
        x_hats.append(total)
    return Reconstructions(x_hats, [1 / len(x_hats)] * len(x_hats))


def faults(n_features: int, *, k: float, prefixes: tuple[float, ...]) -> Iterable[str]:
    """Prefixes must grow to the whole dictionary, by at least one feature each."""
    yield from budget_faults(n_features, k=k)
    lengths = [round(fraction * n_features) for fraction in prefixes]
    rising = all(a < b for a, b in zip([0, *lengths], lengths, strict=False))
    if not rising or prefixes[-1] != 1:
        yield (
            f"prefixes={list(prefixes)} must rise to 1.0, each a fraction of the "
            f"dictionary that holds at least one feature more than the one before "
            f"(lengths at n_features={n_features}: {lengths})."
        )


register(
    Rule(
        name="matryoshka",
        paper="Bussmann et al. 2025 (arXiv:2503.17547)",
        decides="as a batch budget; nested prefixes must each reconstruct",
        encode=over_batch.encode,
        init=over_batch.threshold_init,
        export=over_batch.export,
        reconstructions=nested,
        example={"k": 4.0, "prefixes": (0.125, 0.25, 0.5, 1.0)},
        knob="k",
        budget="k",
        faults=faults,
        couples_batch=True,
    )
)
