"""The folders of SAELens: `cfg.json` and `sae_weights.safetensors`.

Read are the layouts of version 6 and of those before it, with SAELens's own rule for
telling them apart; what it trains and what it exports. Written is what 6.54.12 loads.
Codes are those of its `encode`, also where a file has `normalize_activations` of
"expected_average_only_in": it scales nothing then, unless the scale of the training
lies beside the weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sae_jax import checks, formats
from sae_jax.exchange.layout import (
    Foreign,
    assembled,
    description,
    setting,
    table,
    take,
)
from sae_jax.exchange.outward import Outward, outward
from sae_jax.exchange.provenance import about_of, facts_of, section, site_of
from sae_jax.exchange.tensors import of_safetensors
from sae_jax.formats import Place
from sae_jax.trained import TrainedSAE
from sae_jax.treatment import Treatment

NAME, CONFIG, WEIGHTS, SCALE = (
    "saelens",
    "cfg.json",
    "sae_weights.safetensors",
    "activation_scaler.json",
)
# Without a version of 6 or later it would take its own file for an old one.
WRITTEN_FOR = "6.54.12"

# TransformerLens would fold norms into weights and centre them; sites hold what the
# model itself computes.
AS_IT_IS = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed"), False)

OFF_UNIT = 1e-4
SCALED = "expected_average_only_in"
TREATMENTS: dict[str, Treatment] = {
    SCALED: "none",
    "none": "none",
    "layer_norm": "standardise",
}
REFUSED = {
    "constant_norm_rescale": "it scales each row to one norm, which no treatment does",
    "covariance_whitening": "the whitening is not in its weights yet; let SAELens "
    "export it (save_inference_model)",
}


def recognises(place: Place) -> bool:
    """The weights' name is SAELens's alone."""
    named = WEIGHTS in place.given or (CONFIG in place.given and place.has(WEIGHTS))
    return named and place.has(CONFIG)


def read(place: Place) -> TrainedSAE:
    """An SAE or transcoder of SAELens."""
    path, weights = place.folder / CONFIG, place.folder / WEIGHTS
    config = current(path, description(path))
    architecture, known = _architecture(path, config)
    held = of_safetensors(weights)
    transcoder, tied = known.get("transcoder", False), known.get("tied", False)
    arrays = ["W_dec", "b_dec"] if tied else ["W_enc", "W_dec", "b_enc", "b_dec"]
    keys = {name: name for name in arrays} | known.get("arrays", {})
    keys |= {"W_enc": "W_enc.T"} if not tied else {}
    if "log_threshold" in held and keys.get("threshold"):
        keys["threshold"] = "log_threshold"  # as trained before 2026
    sizes = {"D_in": setting(path, config, "d_in", int)}
    sizes["F"] = setting(path, config, "d_sae", int)
    if transcoder:
        sizes["D_out"] = setting(path, config, "d_out", int)
    given = take(
        weights,
        held,
        keys,
        sizes=sizes,
        ignored=frozenset({"scaling_factor"}),
        transcoder=transcoder,
    )
    _scaling_factor(weights, held)
    if keys.get("threshold") == "log_threshold":
        given["threshold"] = np.exp(given["threshold"])
    centre = setting(path, config, "apply_b_dec_to_input", bool)
    if tied and not centre:
        raise ValueError(
            f"{path}: {architecture} with apply_b_dec_to_input false has no bias at "
            f"all, which its rule here cannot do without."
        )
    if transcoder and centre:
        raise ValueError(f"{path}: apply_b_dec_to_input is false for transcoders.")
    rescaled = bool(config.get("rescale_acts_by_decoder_norm", False))
    if config["normalize_activations"] == SCALED:
        given = _with_scale(place, given, rescaled)
    if rescaled and not tied:
        given = unit_rows(given)
    metadata = config["metadata"]
    about = about_of(
        NAME,
        metadata,
        lm=metadata.get("model_name"),
        site=site_of(metadata.get("hook_name")),
        target=site_of(metadata.get("hook_name_out")),
        architecture=architecture,
    )
    settings = {name: config.get(name) for name in known.get("settings", [])}
    if tied:
        _require_unit_rows(weights, given["W_dec"])
        if settings["max_iterations"] is None:
            settings["max_iterations"] = sizes["D_in"]
    treatment = TREATMENTS[config["normalize_activations"]]
    foreign = Foreign(
        known["kind"], given, settings, centre, about, treatment, transcoder
    )
    return assembled(path, foreign)


def current(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The description in the layout of version 6, as SAELens itself would take it."""
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: metadata is {metadata!r}; needed is an object.")
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    config = {"apply_b_dec_to_input": True, "normalize_activations": "none", **config}
    if re.match(r"([6-9]|\d\d)\.", str(version or "")):
        return config | {"metadata": metadata}
    known = table(NAME)["activations"]
    usual = next(iter(known))
    activation = config.get("activation_fn_str", config.get("activation_fn", usual))
    if not isinstance(activation, str) or activation not in known:
        said = checks.unknown("activation", str(activation), known)
        raise ValueError(f"{path}: {said}")
    extra = config.get("activation_fn_kwargs") or {}
    old = {"architecture": known[usual], **config}
    if activation != usual:
        old |= {"architecture": known[activation], **(extra if _of_k(extra) else {})}
    normalised = old["normalize_activations"]
    if isinstance(normalised, bool) or normalised is None:
        scaled = "expected_average_only_in" if normalised else "none"
        old["normalize_activations"] = scaled
    hook = old.get("hook_name", old.get("hook_point"))
    names = ("model_name", "dataset_path", "context_size", "prepend_bos")
    found = {name: old[name] for name in names if name in old}
    return old | {"metadata": {"hook_name": hook, **found}}


def _of_k(extra: Any) -> bool:
    return isinstance(extra, dict) and extra.keys() <= {"k"}


def _architecture(path: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    architecture, known = config.get("architecture"), table(NAME)["architectures"]
    if not isinstance(architecture, str) or architecture not in known:
        said = checks.unknown("architecture", str(architecture), known)
        raise ValueError(f"{path}: {said}")
    refused = known[architecture].get("refused")
    normalised = str(config["normalize_activations"])
    if not refused and normalised not in TREATMENTS:
        why = REFUSED.get(normalised, f"known are {', '.join(TREATMENTS)}")
        refused = f"of its normalize_activations={normalised!r}: {why}"
    if refused:
        raise ValueError(f"{path}: {architecture} is not read, since {refused}.")
    return architecture, known[architecture]


def _scaling_factor(path: Path, held: Any) -> None:
    if "scaling_factor" in held and not (held["scaling_factor"].get() == 1).all():
        raise ValueError(
            f"{path}: its scaling_factor, of a finetuning, is not 1 throughout; fold "
            f"it into the weights first."
        )


def _require_unit_rows(path: Path, W_dec: np.ndarray) -> None:
    """Its pursuit takes d . r for a coefficient, whatever the norm of d."""
    off = np.abs(np.linalg.norm(W_dec.astype(np.float64), axis=1) - 1).max()
    if off > OFF_UNIT:
        raise ValueError(
            f"{path}: a row of W_dec has a norm that is {off:.2g} from 1. Ours divides "
            f"by the norms of rows where theirs does not; needed are rows of norm 1."
        )


def unit_rows(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The norms of the decoder's rows moved into the encoder: codes in their units."""
    norms = np.linalg.norm(arrays["W_dec"].astype(np.float64), axis=1)
    norms = np.maximum(norms, 1e-8).astype(np.float32)
    return arrays | {
        "W_enc": arrays["W_enc"] * norms[:, None],
        "b_enc": arrays["b_enc"] * norms,
        "W_dec": arrays["W_dec"] / norms[:, None],
    }


def _with_scale(
    place: Place, arrays: dict[str, np.ndarray], rescaled: bool
) -> dict[str, np.ndarray]:
    """With the scale of a training that has not ended, if it lies beside."""
    if not place.has(SCALE):
        return arrays
    path = place.folder / SCALE
    factor = setting(path, description(path), "scaling_factor", float, int, type(None))
    if factor is None:
        return arrays
    if not 1e-30 < factor < 1e30:
        raise ValueError(f"{path}: scaling_factor={factor!r} is no scale.")
    factor = np.float32(factor)
    # A threshold on codes in units of the decoder's norms moves with those.
    shrink = {"W_dec", "b_dec"} | ({"shared_threshold"} if rescaled else set())
    scaled = {name: arrays[name] / factor for name in shrink & arrays.keys()}
    return arrays | scaled | {"W_enc": arrays["W_enc"] * factor}


def write(trained: TrainedSAE, folder: Path) -> None:
    """What `sae_lens.SAE.load_from_disk` reads."""
    outside = outward(trained, "SAELens")
    architecture, known = _counterpart(outside)
    sae, facts = outside.sae, facts_of(trained)
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    held = outside.weights | dict(outside.counterpart.arrays)
    names |= known.get("arrays", {})
    if known.get("tied"):
        if not sae.centred:
            raise outside.refusal("SAELens", "it adds no b_dec that it has not taken.")
        names = {name: name for name in ("W_dec", "b_dec")}
    held["W_enc"] = held["W_enc"].T
    arrays = {name: np.ascontiguousarray(held[ours]) for ours, name in names.items()}
    save_file(arrays, folder / WEIGHTS)
    settings = {n: outside.counterpart.settings[n] for n in known.get("settings", [])}
    settings |= known.get("fixed", {})
    if sae.is_transcoder:
        settings["d_out"] = sae.width_out
    normalised = {ours: theirs for theirs, ours in TREATMENTS.items()}
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "dtype": str(arrays["W_dec"].dtype),
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": normalised[sae.treatment],
        "reshape_activations": "none",
        **settings,
        "metadata": {
            "sae_lens_version": WRITTEN_FOR,
            "sae_lens_training_version": None,
            **facts,
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": AS_IT_IS,
            # Joined contexts have BOS where a document begins, not at their own start.
            "prepend_bos": not section(trained.about, "packing").get("join", False),
        },
    }
    if str(facts["hook_name"]).endswith("hook_z"):
        config["reshape_activations"] = "hook_z"
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _counterpart(outside: Outward) -> tuple[str, dict[str, Any]]:
    """Its name at SAELens."""
    kind, aims = outside.counterpart.kind, outside.sae.is_transcoder
    for architecture, known in table(NAME)["architectures"].items():
        if known.get("kind") == kind and known.get("transcoder", False) == aims:
            return architecture, known
    raise outside.refusal("SAELens", "it has no transcoder of this kind.")


formats.register(
    formats.Format(
        name=NAME,
        holds=f"a folder of {CONFIG} and {WEIGHTS}",
        recognises=recognises,
        read=read,
        write=write,
        files=frozenset({CONFIG, WEIGHTS}),
    )
)
