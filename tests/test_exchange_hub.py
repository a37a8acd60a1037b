"""The Hugging Face hub without a network: what is asked of it, and what comes of it."""

import dataclasses
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from sae_jax import load, push_to_hub
from sae_jax.exchange.hub import on_hub, place
from sae_jax.exchange.layout import table
from tests.test_exchange import RECORDED, folder_of, made


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository, in the layout of its cache: links to blobs."""
    asked = []
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"

    def add(folder: Path, inside: str) -> None:
        for file in folder.iterdir():
            blob = tmp_path / "models--a--b" / "blobs" / f"{len(asked)}-{file.name}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(file.read_bytes())
            link = snapshot / inside / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)

    def download(repo, *, allow_patterns, etag_timeout):
        asked.append((repo, allow_patterns))
        if repo == "a/absent":
            response = type("Response", (), {"headers": {}, "request": None})()
            raise RepositoryNotFoundError("404 Client Error.", response=response)
        return str(snapshot)

    snapshot.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return add, asked


@pytest.mark.parametrize("inside", ["", "layers/blocks.3.hook_resid_post"])
def test_a_folder_of_a_repository(hub, inside):
    add, asked = hub
    add(folder_of(RECORDED / "saelens" / "topk"), inside)
    read = load(f"a/b/{inside}" if inside else "a/b")
    assert read.sae.bound.spec == "topk(k=3)"
    ((repo, patterns),) = asked
    assert repo == "a/b"
    start = f"{inside}/" if inside else ""
    assert f"{start}sae_weights.safetensors" in patterns
    assert all(p.startswith(start) and "*" not in p for p in patterns)


def test_a_release_by_name(hub):
    add, asked = hub
    add(folder_of(RECORDED / "saelens" / "old_layout_topk"), "blocks.8.hook_resid_pre")
    read = load("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert read.about["site"] == "resid_pre.3"
    assert asked[0][0] == "jbloom/GPT2-Small-SAEs-Reformatted"


def test_releases_say_where_their_saes_are():
    name = "gpt2-small-resid-post-v5-32k/blocks.7.hook_resid_post"
    assert on_hub(name) == (
        "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs",
        "v5_32k_layer_7.pt",
    )
    inside = "layer_20/width_16k/average_l0_71"
    assert on_hub(f"gemma-scope-2b-pt-res/{inside}")[1] == inside
    with pytest.raises(ValueError, match=r"no SAE of pythia-70m.*their names are like"):
        on_hub("pythia-70m-deduped-res-sm/3")
    for name, release in table("releases").items():
        assert release["repo"].count("/") == 1, name
        assert ("sae" in release) == ("path" in release), name


def test_what_is_not_there_is_said(hub):
    add, _ = hub
    with pytest.raises(ValueError, match=r"could not be fetched.*404 Client Error"):
        load("a/absent")
    with pytest.raises(ValueError, match=r"has no 'layers\.9'"):
        load("a/b/layers.9")
    with pytest.raises(ValueError, match="has no SAE in its root"):
        load("a/b")
    add(RECORDED / "saelens" / "topk", "")  # expected.npz as well, which is nothing
    assert place("a/b").has("cfg.json")


def test_a_path_is_never_asked_of_the_hub(hub):
    _, asked = hub
    with pytest.raises(ValueError, match="There is no folder or file runs/mine"):
        load(Path("runs/mine"))
    assert not asked


class Api:
    """Writes down what is asked of it, and keeps what is uploaded."""

    def __init__(self, kept: Path):
        self.kept, self.asked = kept, []

    def create_repo(self, repo, **options):
        self.asked.append(("create", repo, options))

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message):
        self.asked.append(("upload", repo_id, path_in_repo, commit_message))
        to = self.kept / (path_in_repo or "")
        to.mkdir(parents=True, exist_ok=True)
        for file in Path(folder_path).iterdir():
            (to / file.name).write_bytes(file.read_bytes())
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.mark.parametrize("format", ["sae_jax", "saelens", "sparsify"])
@pytest.mark.parametrize("folder", ["", "layers/3"])
def test_an_upload_can_be_read_again(format, folder, monkeypatch, tmp_path):
    api = Api(tmp_path / "kept")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    one = made("topk")
    where = push_to_hub(one, "me/mine", format, folder=folder, private=True)
    assert where == "https://huggingface.co/me/mine/commit/1"
    created, uploaded = api.asked
    assert created == ("create", "me/mine", {"exist_ok": True, "private": True})
    assert uploaded[:3] == ("upload", "me/mine", folder or None)
    there = tmp_path / "kept" / folder
    assert load(there).about == one.about | (
        {} if format == "sae_jax" else {"format": format}
    )
    card = (there / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sae_jax\n")
    for part in (
        f'sae_jax.load("me/mine{"/" * bool(folder)}{folder}")',
        "`topk(k=4)`",
        "| Site | resid_post.3 |",
        "| Language model | gpt2 |",
        "| Dataset | embedded |",
        "| nmse | 0.2 |",
        one.provenance()["configuration"],
    ):
        assert part in card, part


def test_what_cannot_be_written_is_not_uploaded(monkeypatch, tmp_path):
    api = Api(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    one = made("top_afa")
    with pytest.raises(ValueError, match="norm of its input"):
        push_to_hub(one, "me/mine", "saelens")
    for repo, folder in {"mine": "", "me/../x": "", "me/mine": "../x"}.items():
        with pytest.raises(ValueError, match="give owner/repository"):
            push_to_hub(one, repo, folder=folder)
    with pytest.raises(ValueError, match="is read, not written"):
        push_to_hub(one, "me/mine", "openai")
    assert not api.asked


def test_a_card_stays_a_table(monkeypatch, tmp_path):
    api = Api(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    one = made("topk")
    push_to_hub(dataclasses.replace(one, about={"lm": "a | b\n\n# c"}), "me/mine")
    assert r"| Language model | a \| b # c |" in (tmp_path / "README.md").read_text()
