"""Where an SAE is: a folder or file here, or on the Hugging Face hub; and back there.

Fetched are the files that the formats know by name, and no others; nothing of them is
executed. A name on the hub is `owner/repository/folder`, or that of a well-known
release (`releases.toml`) with the SAE's own after it.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from sae_jax.exchange.layout import table
from sae_jax.exchange.provenance import section, text_of
from sae_jax.formats import FORMATS, Place, writable
from sae_jax.trained import OWN, TrainedSAE

FILES = """sae.json sae.safetensors cfg.json sae_weights.safetensors
activation_scaler.json ae.pt config.json params.npz params.safetensors""".split()
# No empty part, and none of dots alone: a name never leaves the repository.
NAME = re.compile(r"(?!\.+(/|$))[\w.+:-]+(/(?!\.+(/|$))[\w.+:-]+)+")


def place(given: str | Path) -> Place:
    """The place that a path or a name on the hub stands for."""
    path = Path(given).expanduser()
    if path.is_dir():
        return Place(path, frozenset(f.name for f in path.iterdir() if f.is_file()))
    if path.is_file():
        return Place(path.parent, frozenset({path.name}))
    if not isinstance(given, str) or not NAME.fullmatch(given):
        raise ValueError(
            f"There is no folder or file {given}. Give one that holds an SAE, a name "
            f"on the Hugging Face hub (owner/repository/folder), or release/sae of "
            f"{', '.join(sorted(table('releases')))}."
        )
    repo, inside = on_hub(given)
    fetched = place(_fetched(given, repo, inside))
    if not fetched.given:
        raise ValueError(
            f"{given!r}: {repo} on the Hugging Face hub has no SAE in "
            f"{inside or 'its root'}; look there for the folder's name."
        )
    return fetched


def on_hub(name: str) -> tuple[str, str]:
    """Repository and folder of a name, which may be that of a release."""
    first, rest = name.split("/", 1)
    if first not in table("releases"):
        owner, repo, *inside = name.split("/")
        return f"{owner}/{repo}", "/".join(inside)
    release = table("releases")[first]
    found = re.fullmatch(release.get("sae", "(.+)"), rest)
    if not found:
        raise ValueError(
            f"{rest!r} is no SAE of {first}; their names are like {release['sae']}."
        )
    return release["repo"], release.get("path", "{0}").format(*found.groups())


def _fetched(given: str, repo: str, inside: str) -> Path:
    """The folder or file, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [f"{inside}/{name}" if inside else name for name in FILES]
    patterns += [inside] if inside.endswith((".pt", ".npz")) else []
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, etag_timeout=5))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise ValueError(
            f"{given!r} is no folder here and could not be fetched from the Hugging "
            f"Face hub: {reason} Give a local folder, or the right name."
        ) from None
    found = folder / inside
    if not found.exists():
        raise ValueError(
            f"{given!r}: {repo} on the Hugging Face hub has no {inside!r}."
        )
    return found


def push_to_hub(
    trained: TrainedSAE,
    repo: str,
    format: str = OWN,
    *,
    folder: str = "",
    private: bool = False,
) -> str:
    """Uploads the SAE and a model card to `repo` (made if missing); gives its address.

    `folder` is where in the repository; several SAEs need one each.
    """
    import huggingface_hub

    wrong = [n for n in (repo, folder) if n and not NAME.fullmatch(f"x/{n}")]
    if wrong or repo.count("/") != 1:
        raise ValueError(
            f"repo={repo!r}, folder={folder!r}: give owner/repository, and a folder "
            f"in it or nothing."
        )
    writable(format)
    with tempfile.TemporaryDirectory() as made:
        saved = trained.save(Path(made) / "sae", format)
        where = f"{repo}/{folder}" if folder else repo
        (saved / "README.md").write_text(card(trained, where, format))
        api = huggingface_hub.HfApi()
        api.create_repo(repo, exist_ok=True, private=private)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=saved,
            path_in_repo=folder or None,
            commit_message=f"{trained.sae.bound.rule.name} SAE of sae_jax",
        )
    return str(done)


def card(trained: TrainedSAE, where: str, format: str) -> str:
    """The model card: how to load it, what it is, where it came from, how it does."""
    facts, sae, about = trained.provenance(), trained.sae, trained.about
    kind = "transcoder" if sae.is_transcoder else "sparse autoencoder"
    said = {
        "Rule": f"`{sae.bound.spec}` ({sae.bound.rule.paper})",
        "Features": sae.n_features,
        "Width": f"{sae.d_in}" + (f" to {sae.d_out}" if sae.is_transcoder else ""),
        "Language model": about.get("lm"),
        "Site": about.get("site"),
        "Target": about.get("target"),
        "Dataset": text_of(about).get("dataset"),
        "Steps": about.get("steps"),
        "Input treatment": sae.treatment,
        "Format": FORMATS[format].holds,
        "Made by": f"sae_jax {facts['sae_jax']}",
        "Configuration, SHA-256": f"`{facts['configuration']}`",
    }
    lines = ["---", "library_name: sae_jax", "tags:", "- sparse-autoencoder", "---", ""]
    lines += [f"# {where}", "", f"A {kind} for interpretability research.", ""]
    lines += ["```python", "import sae_jax", "", f'sae = sae_jax.load("{where}")']
    lines += ["x_hat, codes = sae(activations)", "```", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {cell(v)} |" for name, v in said.items() if v is not None]
    scores = section(about, "scores")
    numbers = {n: v for n, v in scores.items() if isinstance(v, float)}
    if numbers:
        lines += ["", "| score on held-out text | |", "|---|---|"]
        lines += [f"| {cell(name)} | {value:.4g} |" for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A value on one line of a table."""
    return " ".join(str(value).split()).replace("|", r"\|")
