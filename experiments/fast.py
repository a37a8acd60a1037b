"""FAST: SAEs of a chat model trained on dialogues, each run alone, against blocks.

After Li et al. 2025 (arXiv:2506.07691). The same rules are trained three times, on as
many tokens, and scored on the same held-out dialogues, each of them run alone:

    fast     dialogues by the chat template, each alone, rows mixed in a mixing buffer
    blocks   the same dialogues one after the other, cut into blocks (the paper's BT(F))
    plain    the plain text of --dataset, cut into blocks (the paper's BT(P))

Only the first two tell of the procedure; `plain` is of other data as well. By default
the dialogues are questions and answers on the functions of this Python.

Command:  python launch.py --experiment=fast
Example:  python launch.py --experiment=fast --lm=Qwen/Qwen2.5-0.5B-Instruct
          --source=torch --chat_template= --dialogues=allenai/tulu-3-sft-mixture
          --dataset=Skylion007/openwebtext --site=resid_post.12 --context=2048
Leaves:   out/fast.json, fast.txt, results.csv, figures/fast.png, report.html;
          out/dialogues; in out/fast, out/blocks and out/plain what training leaves
Hardware: 2 CPU cores, ten minutes of processor time, a third of it to score.
Expected: on the files of Python 3.11, TopK: MSE .79, .92, 1.29 of all tokens and .21,
          .50, 1.63 of special ones, in the order above.
Note:     the paper's headline "MSE" is log2 of that of special tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from experiments._dialogues import FILE, PARTS, prepared
from experiments._left import leave_found, leave_page
from experiments._report import Figure, rows_of
from experiments._training import Config as Training
from experiments._training import Wanted, run_training
from sae_jax import report
from sae_jax.config import Data, Dictionary, Evaluating
from sae_jax.evaluation import Evaluation, Evaluator, HeldOut
from sae_jax.evaluation.by_context import errors_by_context
from sae_jax.losses import AuxK
from sae_jax.report import drawing
from sae_jax.report.dialogues import dialogues_figure, dialogues_text
from sae_jax.run import hosts
from sae_jax.run.loop import Every
from sae_jax.run.stop import Stop
from sae_jax.settings import Spec
from sae_jax.text.dialogues import rendered
from sae_jax.text.opening import open_documents
from sae_jax.trained import TrainedSAE
from sae_jax.training.recipe import Recipe
from sae_jax.whole_files import write_whole

TITLE = "Dialogues run alone, and in blocks"
CAPTION = (
    "log2 of the squared error on held-out dialogues, averaged in each dialogue and "
    "then over them: of all tokens, and of special ones. Lower is better."
)
WAYS = {
    "fast": "dialogues alone (FAST)",
    "blocks": "dialogues in blocks, BT(F)",
    "plain": "plain text in blocks, BT(P)",
}


@dataclass
class Config(Training):
    """What can be set from the command line."""

    out: str = "runs/fast"
    dialogues: Annotated[
        str,
        "a file, folder or Hugging Face id whose column `messages` holds dialogues; "
        "empty: such are made",
    ] = ""
    overlap: Annotated[
        int,
        "a dialogue that shares so many words in a row with an earlier one is left "
        "out; 0: all are kept",
    ] = 20
    chat_template: str = "plain"
    rules: Annotated[tuple[Spec, ...], "the rules"] = (
        Spec("topk(k=32)"),
        Spec("relu(coef=0.01)"),
    )
    site: Annotated[str, "what the SAEs read: place.layer"] = "resid_post.2"
    scored: Annotated[int, "held-out dialogues that all are scored on, at most"] = 200
    context: int = 256
    use_bos: bool = True
    sae: Dictionary = Dictionary(expansion=8, treatment="scale")
    data: Data = Data(batch=512, buffer=8192)
    train: Recipe = Recipe(
        steps=600, lr=1e-3, warmup=50, decay="cosine", aux=AuxK(dead_after=100)
    )
    every: Every = Every(log=20, save=300)
    evaluation: Evaluating = Evaluating(contexts=16)

    def wanted(self) -> list[Wanted]:
        """An SAE of each rule."""
        return [Wanted(spec, self.site) for spec in self.rules]

    def way(self, name: str, folders: dict[str, Path]) -> "Config":
        """The settings of one of the trainings; `folders` hold the dialogues."""
        own = replace(self, out=str(Path(self.out).expanduser() / name))
        if name == "plain":
            return own
        heldout = replace(self.evaluation, dataset=str(folders["heldout"]), part="all")
        own = replace(
            own,
            dataset=str(folders["train"]),
            part="all",
            column="messages",
            evaluation=heldout,
        )
        if name == "blocks":
            return own
        data = replace(self.data, mixing="buffer")
        return replace(own, join=False, whole=True, data=data)

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if hosts.several():
            yield "three trainings follow one another, which is for one process alone"
        if self.data.shards:
            yield "data.shards: harvested rows are of one way; give text"
        if self.overlap < 0 or self.scored < 1:
            yield "overlap must not be negative, and scored at least 1"
        faults = list(super().faults())
        yield from faults
        if faults:
            return
        try:
            rendered([{"role": "user", "content": "x"}], self.open_tokenizer())
            if self.dialogues:
                open_documents(self.dialogues, part="train", column="messages")
        except (ValueError, OSError) as error:
            yield f"dialogues: {error}"

    def conflicts(self) -> list[str]:
        """What is asked for once nothing else is wrong."""
        folders = {part: folder_of(self) / part for part in PARTS}
        ways = (self.way(name, folders) for name in WAYS)
        return [fault for way in ways for fault in super(Config, way).conflicts()]

    def estimates(self) -> dict[str, str]:
        """What a dry run says of size."""
        return {"trainings": f"{len(WAYS)}, each of this size:", **super().estimates()}


def folder_of(config: Config) -> Path:
    """Where the dialogues are written."""
    return Path(config.out).expanduser() / "dialogues"


def run(config: Config) -> None:
    """Trains three times, scores all on the same dialogues, and reports."""
    folders = prepared(folder_of(config), config.dialogues, config.overlap)
    saes: dict[str, TrainedSAE] = {}
    with Stop() as stop:
        for way in WAYS:
            print(f"Training: {WAYS[way]} ...", flush=True)
            result = run_training(config.way(way, folders), stop)
            saes |= {f"{name}-{way}": one for name, one in result.trained.items()}
    lm, tokenizer = result.evaluator.lm, result.tokenizer
    heldout = held_out(config, folders, tokenizer)
    evaluator = Evaluator(lm, heldout, contexts_per_pass=config.data.contexts_per_pass)
    evaluations: dict[str, Evaluation] = {}
    for name, one in saes.items():
        evaluation = evaluator(one.sae, one.variables, config.site)
        errors = errors_by_context(
            lm,
            one.sae,
            one.variables,
            config.site,
            heldout,
            tokenizer.all_special_ids,
            contexts_per_pass=config.data.contexts_per_pass,
        )
        evaluations[name] = evaluation._replace(scores=evaluation.scores | errors)
    rows = [
        {**row, "way": row["name"].rsplit("-", 1)[1]}
        for row in rows_of(saes, evaluations)
    ]
    write(config, rows, heldout, len(tokenizer.all_special_ids))


def held_out(config: Config, folders: dict[str, Path], tokenizer: Any) -> HeldOut:
    """Held-out dialogues, each alone; as many as there are, or as are asked for."""
    alone = config.way("fast", folders)
    there = replace(alone, dataset=alone.evaluation.dataset)
    n = (folders["heldout"] / FILE).read_text().count("\n")
    packing = there.packing(repeat=False)
    documents = there.open_documents()
    return HeldOut.read(documents, tokenizer, packing, min(n, config.scored))


def write(
    config: Config, rows: list[dict[str, Any]], heldout: HeldOut, n_special: int
) -> None:
    """Prints the scores, and leaves them with a picture and the page."""
    out = Path(config.out).expanduser()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    tokens = config.train.steps * config.data.batch
    said = (
        f"{len(heldout.tokens)} held-out dialogues, {int(heldout.use.sum()):,} tokens "
        f"(ids of special ones: {n_special}), trained on {tokens:,} tokens each. Ways: "
        + "; ".join(f"{name}: {what}" for name, what in WAYS.items())
        + "."
    )
    text = dialogues_text(rows)
    leave_found("fast", config, f"{said}\n\n{text}", {"saes": rows})
    write_whole(out / "results.csv", report.csv_text(rows))
    picture = out / "figures" / "fast.png"
    drawing.save(dialogues_figure(rows, WAYS), picture)
    leave_page(
        config,
        title=TITLE,
        summary=f"Language model: {config.lm}. {said}",
        rows=rows,
        figures=[Figure(picture, CAPTION)],
        notes={TITLE: text},
    )
