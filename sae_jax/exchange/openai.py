"""The .pt files of openai/sparse_autoencoder.

`codes = activation((x - pre_bias) @ encoder.weight.T + latent_bias)`, with the row's
mean and spread taken out first, and put back into the reconstruction, where the
activation is TopK; that is our treatment "standardise" to the letter. The pickle goes
through PyTorch's weights-only loader, after a look at what it names.
"""

from typing import Any

from sae_jax import checks, formats
from sae_jax.exchange.layout import Foreign, assembled, setting, table, take
from sae_jax.exchange.provenance import about_of
from sae_jax.exchange.tensors import of_pickle
from sae_jax.formats import Place
from sae_jax.trained import TrainedSAE

NAME = "openai"
KEYS = {
    "W_enc": "encoder.weight",
    "b_enc": "latent_bias",
    "W_dec": "decoder.weight.T",
    "b_dec": "pre_bias",
}
COUNTERS = frozenset(
    {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
)
TAKEN = frozenset({"ae.pt"})  # the name that dictionary_learning gives


def _files(place: Place) -> list[str]:
    return sorted(n for n in place.given - TAKEN if n.endswith(".pt"))


def recognises(place: Place) -> bool:
    """A file of PyTorch's with no name that another format has for it."""
    return len(_files(place)) == 1


def read(place: Place) -> TrainedSAE:
    """An autoencoder of OpenAI's."""
    path = place.folder / _files(place)[0]
    held, beside = of_pickle(path)
    name = beside.get("activation", next(iter(table(NAME))))
    if not isinstance(name, str) or name not in table(NAME):
        said = checks.unknown("activation", str(name), table(NAME))
        raise ValueError(f"{path}: {said}")
    known = table(NAME)[name]
    extra = beside.get("activation_state_dict", {})
    extra = extra if isinstance(extra, dict) else {}
    after = extra.get("postact_fn", next(iter(table(NAME))))
    refused = known.get("refused") or table(NAME).get(str(after), {}).get("refused")
    if refused:
        raise ValueError(f"{path}: {name} with {after} is not read, since {refused}.")
    settings = {n: setting(path, extra, n, int) for n in known.get("settings", [])}
    arrays = take(path, held, KEYS, ignored=COUNTERS)
    about: dict[str, Any] = about_of(NAME, {}, activation=name, file=path.name)
    treatment = known.get("treatment", "none")
    return assembled(
        path, Foreign(known["kind"], arrays, settings, True, about, treatment)
    )


formats.register(
    formats.Format(
        name=NAME,
        holds="a .pt file of its autoencoder",
        recognises=recognises,
        read=read,
    )
)
