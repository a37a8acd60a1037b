"""Settings shared by experiments, and the objects that they stand for.

Experiments inherit these classes, so that a setting has one name, one default and one
description everywhere. Only experiments and `launch.py` know of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

from sae_jax import checks
from sae_jax.activations.mixing import Mixed
from sae_jax.architecture import DType
from sae_jax.evaluation import Evaluator, HeldOut
from sae_jax.model import SAE
from sae_jax.start import Start
from sae_jax.text.contexts import Packing
from sae_jax.text.documents import Documents, Part
from sae_jax.text.opening import open_documents
from sae_jax.text.tokenizer import load_tokenizer
from sae_jax.treatment import Treatment


@dataclass
class ModelConfig:
    """The language model."""

    lm: Annotated[
        str,
        "language model: 'embedded', a local folder in the Hugging Face layout, or a "
        "Hugging Face id such as gpt2",
    ] = "embedded"
    source: Annotated[
        Literal["flax", "torch"],
        "what runs it: transformers' Flax models, or any causal LM in PyTorch "
        "(needs the extra 'torch')",
    ] = "flax"
    lm_dtype: Annotated[
        Literal["float32", "bfloat16"], "the type in which it is computed"
    ] = "float32"

    chat_template: Annotated[
        str, "of dialogues: a file in Jinja, or 'plain'; empty: the tokenizer's own"
    ] = ""

    def open_lm(self) -> Any:
        """The model, loaded."""
        # Imported here: transformers takes seconds, and bad settings are found sooner.
        if self.source == "flax":
            from sae_jax.lm.flax_lm import FlaxLM

            return FlaxLM.load(self.lm, dtype=self.lm_dtype)
        from sae_jax.lm.torch_lm import TorchLM

        return TorchLM.load(self.lm, dtype=self.lm_dtype)

    def outline(self) -> Any:
        """The model's sites and widths, without its weights; None for PyTorch."""
        if self.source == "torch":
            return None
        return outline(self.lm)

    def model_faults(self, sites: tuple[str, ...], context: int) -> list[str]:
        """What does not fit the language model, as far as its configuration tells."""
        try:
            lm = self.outline()
            self.open_tokenizer()
        except (ValueError, OSError) as error:
            return [f"lm: {error}"]
        faults = []
        if lm is not None and context > lm.context:
            faults.append(
                f"context={context} is more than the {lm.context} tokens that "
                f"lm={self.lm!r} was built for"
            )
        for site in sites if lm else ():
            try:
                lm.width(site)
            except ValueError as error:
                faults.append(str(error))
        return faults

    def open_tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.lm, chat_template=self.chat_template)


@cache
def outline(name: str) -> Any:
    """`FlaxLM.outline`, kept, since it is asked for often."""
    from sae_jax.lm.flax_lm import FlaxLM

    return FlaxLM.outline(name)


@dataclass
class TextConfig:
    """The text, and how it is cut into contexts."""

    dataset: Annotated[
        str,
        "text: 'embedded' (this Python's own files), a local file or folder (.txt .md "
        ".py .jsonl .parquet), or a Hugging Face id such as Skylion007/openwebtext",
    ] = "embedded"
    part: Annotated[
        Part, "which documents, by a hash of their names; 'all' for all"
    ] = "train"
    column: Annotated[
        str, "column of tables that holds text, dialogues (messages) or token ids"
    ] = "text"
    split: Annotated[str, "split of a Hugging Face dataset"] = "train"
    subset: Annotated[str, "subset (name) of a Hugging Face dataset, if any"] = ""
    context: Annotated[int, "tokens per context"] = 128
    join: Annotated[bool, "whether a context may hold several documents"] = True
    whole: Annotated[
        bool, "with join=false: a document is one context as it is, the rest left out"
    ] = False
    use_bos: Annotated[bool, "whether activations at BOS are used"] = False
    skip: Annotated[int, "positions at each context's start that are not used"] = 0
    text_seed: Annotated[int, "order of the documents, where they are files"] = 0

    def open_documents(self) -> Documents:
        """The documents."""
        return open_documents(
            self.dataset,
            part=self.part,
            column=self.column,
            split=self.split,
            subset=self.subset or None,
            seed=self.text_seed,
        )

    def text_faults(self) -> list[str]:
        """What is wrong with the text."""
        cut = self.packing(repeat=True).faults()
        faults = [fault.replace("length=", "context=") for fault in cut]
        try:
            self.open_documents()
        except (ValueError, OSError) as error:
            faults.append(f"dataset: {error}")
        return faults

    def packing(self, *, repeat: bool) -> Packing:
        """How they are cut."""
        return Packing(
            self.context, self.join, self.use_bos, self.skip, repeat, self.whole
        )

    def text(self) -> dict[str, Any]:
        """What decides the documents, as plain values."""
        names = ("dataset", "part", "column", "split", "subset", "text_seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Dictionary:
    """The SAE, apart from its rule."""

    n_features: Annotated[
        int, "size of the dictionary; 0: the expansion times the width"
    ] = 0
    expansion: Annotated[int, "features for each dimension of the activations"] = 16
    treatment: Annotated[
        Treatment,
        "what is done to rows first: nothing, each row standardised (as in the Top-AFA "
        "paper's code), or all scaled by one constant",
    ] = "none"
    b_dec_start: Annotated[
        Start, "where the decoder bias starts; estimated from the first batch"
    ] = "zeros"
    dtype: Annotated[DType, "type of the operands of matrix products"] = "float32"

    def __post_init__(self) -> None:
        faults = checks.field_faults("", self)
        if not faults and self.n_features == 0 == self.expansion:
            faults.append("expansion=0 leaves no features; give at least 1.")
        checks.raise_all(faults)

    def make(
        self,
        rule: str,
        width: int,
        target: int | None = None,
        n_features: int | None = None,
    ) -> SAE:
        """The SAE for activations of this width, or a transcoder.

        `n_features` is in place of the size that all have.
        """
        size = self.n_features or self.expansion * width
        size = size if n_features is None else n_features
        return SAE(
            d_in=width,
            n_features=size,
            rule=rule,
            d_out=target,
            treatment=self.treatment,
            b_dec_start=self.b_dec_start,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class Data:
    """Batches of activations."""

    batch: Annotated[int, "rows (tokens) per step"] = 1024
    buffer: Annotated[
        int,
        "on the fly: rows harvested at once; each batch mixes two such blocks. An even "
        "multiple of the batch",
    ] = 32_768
    shards: Annotated[
        str, "folder of harvested activations; empty: the model runs beside the SAE"
    ] = ""
    contexts_per_pass: Annotated[int, "contexts that the model reads at once"] = 16
    readers: Annotated[
        int,
        "on the fly: among how many readers documents are dealt; a multiple of the "
        "number of processes. It decides the batches, the number of processes does not",
    ] = 1
    mixing: Annotated[
        Mixed, "on the fly: rows of two blocks meet, or those of FAST's mixing buffer"
    ] = "neighbours"
    seed: Annotated[int, "order of the rows"] = 0

    def __post_init__(self) -> None:
        faults = checks.field_faults("", self)
        if not faults and 0 in (self.batch, self.contexts_per_pass, self.readers):
            faults.append("batch, contexts_per_pass and readers must be at least 1.")
        elif not faults:
            faults += self._misfits()
        checks.raise_all(faults)

    def _misfits(self) -> Iterator[str]:
        """What does not go together."""
        if self.buffer % (2 * self.batch) or not self.buffer:
            yield (
                f"buffer={self.buffer} must be a multiple of twice the batch, "
                f"{2 * self.batch}."
            )
        if self.batch % self.readers:
            yield f"readers={self.readers} must divide the batch, {self.batch}."
        if self.shards and self.readers > 1:
            yield (
                f"readers={self.readers} are for text, and shards={self.shards!r} are "
                f"read without; leave out one of the two."
            )
        if self.shards and self.mixing != "neighbours":
            yield (
                f"mixing={self.mixing!r} is for text, and shards={self.shards!r} are "
                f"mixed whole; leave out one of the two."
            )


@dataclass(frozen=True)
class Evaluating:
    """Evaluation on held-out text."""

    contexts: Annotated[int, "how many contexts of the held-out text"] = 64
    dataset: Annotated[str, "which text; empty: the same as in training"] = ""
    part: Annotated[Part, "which documents of it; see --part"] = "heldout"

    def __post_init__(self) -> None:
        faults = checks.field_faults("", self)
        if not faults and self.contexts == 0:
            faults.append("contexts=0 evaluates nothing; give at least 1.")
        checks.raise_all(faults)

    def overlaps(self, text: dict[str, Any]) -> bool:
        """Whether documents of the training text (its `TextConfig.text`) are in it."""
        parts = {self.part, text["part"]}
        same = self.dataset in ("", text["dataset"])
        return same and (len(parts) == 1 or "all" in parts)

    def open(self, lm: Any, tokenizer: Any, text: TextConfig, per_pass: int) -> Any:
        """What measures SAEs there."""
        text = replace(text, dataset=self.dataset or text.dataset, part=self.part)
        heldout = HeldOut.read(
            text.open_documents(),
            tokenizer,
            text.packing(repeat=False),
            self.contexts,
        )
        return Evaluator(lm, heldout, contexts_per_pass=per_pass)


@dataclass(frozen=True)
class Reporting:
    """What the report shows beside scores."""

    browse: Annotated[
        int,
        "SAEs whose features can be browsed, at most (training: one of each rule)",
    ] = 3
    steer: Annotated[int, "features of each of them that text is steered by"] = 3

    def __post_init__(self) -> None:
        checks.raise_all(checks.field_faults("", self))
