"""The folders of dictionary_learning: `ae.pt`, and `config.json` beside it.

The pickle goes through PyTorch's weights-only loader, after a look at what it names.
Codes are those of `encode` on the arrays as they are in the file; its own
`from_pretrained` gives an `AutoEncoder`'s decoder rows norm 1 on the way, with codes in
other units. `AutoEncoderTopK` keeps a threshold as well, which its `encode` leaves out.
Without `config.json` the class is found by the names in the file, unless two classes
share them (TopK and BatchTopK).
"""

from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import checks, formats
from sae_jax.exchange.layout import (
    Foreign,
    assembled,
    description,
    setting,
    table,
    take,
)
from sae_jax.exchange.provenance import about_of
from sae_jax.exchange.tensors import Held, of_pickle
from sae_jax.formats import Place
from sae_jax.trained import TrainedSAE

NAME, WEIGHTS, CONFIG = "dictionary_learning", "ae.pt", "config.json"


def recognises(place: Place) -> bool:
    """The name that its training gives the file."""
    return WEIGHTS in place.given


def read(place: Place) -> TrainedSAE:
    """A dictionary of dictionary_learning."""
    path, beside = place.folder / WEIGHTS, place.folder / CONFIG
    config = description(beside) if beside.is_file() else {}
    trainer = config.get("trainer", {})
    if not isinstance(trainer, dict):
        raise ValueError(f"{beside}: trainer is {trainer!r}; needed is an object.")
    held, _ = of_pickle(path)
    name = trainer.get("dict_class") or _class_by_names(path, held)
    if not isinstance(name, str) or name not in table(NAME):
        said = checks.unknown("dict_class", str(name), table(NAME))
        raise ValueError(f"{beside}: {said}")
    known = table(NAME)[name]
    settings = {n: _number(path, held, n) for n in known.get("settings", [])}
    told = {"D_in": "activation_dim", "F": "dict_size"}
    arrays = take(
        path,
        held,
        known["arrays"],
        sizes={
            a: setting(beside, trainer, n, int) for a, n in told.items() if n in trainer
        },
        ignored=frozenset({*known.get("settings", []), *known.get("ignored", [])}),
    )
    about = about_of(
        NAME, config, lm=trainer.get("lm_name"), site=_site(trainer), dict_class=name
    )
    centre = known.get("centre", True)
    return assembled(path, Foreign(known["kind"], arrays, settings, centre, about))


def _class_by_names(path: Path, held: dict[str, Held]) -> str:
    fitting = [
        name for name, known in table(NAME).items() if names_of(known) == {*held}
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise ValueError(
        f"{path} has no {CONFIG} beside it to say which class it is, and the arrays "
        f"{sorted(held)} are those of {' and '.join(fitting) or 'none'}. Put the "
        f"{CONFIG} of its training there: "
        f'{{"trainer": {{"dict_class": "BatchTopKSAE"}}}} is enough.'
    )


def names_of(known: dict[str, Any]) -> set[str]:
    """All names that the file of a class has."""
    arrays = {key.removesuffix(".T") for key in known["arrays"].values()}
    return arrays | {*known.get("settings", []), *known.get("ignored", [])}


def _number(path: Path, held: dict[str, Held], name: str) -> int:
    found = held.get(name)
    if found is None or found.shape != () or found.floats:
        given = "missing" if found is None else f"of shape {list(found.shape)}"
        raise ValueError(f"{path}: {name} is {given}; needed is one whole number.")
    return int(np.asarray(found.get()))


def _site(trainer: dict[str, Any]) -> str | None:
    """Where it was trained, as far as layer and submodule say."""
    layer, module = trainer.get("layer"), str(trainer.get("submodule_name"))
    places = {"resid_post": "resid_post", "attention_out": "attn_out"}
    places |= {"mlp_out": "mlp_out"}
    place = next((p for word, p in places.items() if module.startswith(word)), None)
    return f"{place}.{layer}" if place and isinstance(layer, int) else None


formats.register(
    formats.Format(
        name=NAME,
        holds=f"{WEIGHTS}, with {CONFIG} beside it",
        recognises=recognises,
        read=read,
    )
)
