"""Where an SAE came from, in the words of other libraries, and back.

TransformerLens's names of hooks stand for our sites where the two mean the same.
"""

import re
from typing import Any

from sae_jax.trained import TrainedSAE

HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "head_out": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_hidden": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}


def hook_of(site: Any) -> str | None:
    """The hook at a site; None for one that has none, such as a module's."""
    place, _, layer = str(site).partition(".")
    return HOOKS[place].format(layer) if place in HOOKS and layer.isdecimal() else None


def site_of(hook: Any) -> str | None:
    """The site of a hook, if it is one of these."""
    for place, form in HOOKS.items():
        pattern = re.escape(form).replace(r"\{\}", r"(\d+)")
        if found := re.fullmatch(pattern, str(hook)):
            return f"{place}.{found[1]}"
    return None


def facts_of(trained: TrainedSAE) -> dict[str, Any]:
    """What goes into every export: ours in full, and by the names of SAELens."""
    facts, about = trained.provenance(), trained.about
    return {
        "model_name": about.get("lm"),
        "hook_name": hook_of(about.get("site")),
        "hook_name_out": hook_of(about.get("target")),
        "dataset_path": text_of(about).get("dataset"),
        "context_size": section(about, "packing").get("length"),
        "training_architecture": facts["sae"]["rule"],
        "sae_jax": facts,
    }


def section(about: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of what is known, empty if it is not there."""
    found = about.get(name)
    return found if isinstance(found, dict) else {}


def text_of(about: dict[str, Any]) -> dict[str, Any]:
    """What text an SAE was trained on, directly or by way of shards."""
    return section(about, "text") or section(section(about, "shards"), "text")


def about_of(name: str, config: Any, **found: Any) -> dict[str, Any]:
    """What is known of an SAE that was read; ours, if it was written here."""
    config = config if isinstance(config, dict) else {}
    ours = config.get("sae_jax")
    if isinstance(ours, dict) and isinstance(ours.get("about"), dict):
        return ours["about"] | {"format": name}
    known = {key: value for key, value in found.items() if value is not None}
    return {**known, "format": name, "described_as": config}
