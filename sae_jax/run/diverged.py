"""Training that went out of range: what is said of it."""

from sae_jax.training.window import Window

ADVICE = "Lower the learning rate, clip gradients, or look for huge activations."


class NotFinite(ValueError):
    """Every SAE has diverged; says where, and what is left."""


def said(name: str, window: Window, t: int) -> str:
    """Of an SAE whose window ends with step t."""
    return (
        f"{name}: the loss or its gradient was not finite in step {window.diverged}, "
        f"in the window of steps {t - int(window.count)} to {t - 1}."
    )
