"""Settings shared by experiments, and the objects that they stand for.

Experiments inherit these classes, so that a setting has one name, one default and one
description everywhere. Only experiments and `launch.py` know of them.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sae_jax.text.contexts import Packing
from sae_jax.text.documents import Documents, Part
from sae_jax.text.opening import open_documents
from sae_jax.text.tokenizer import load_tokenizer


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

    def open_lm(self) -> Any:
        """The model, loaded."""
        # Imported here: transformers takes seconds, and bad settings are found sooner.
        if self.source == "flax":
            from sae_jax.lm.flax_lm import FlaxLM

            return FlaxLM.load(self.lm, dtype=self.lm_dtype)
        from sae_jax.lm.torch_lm import TorchLM

        return TorchLM.load(self.lm, dtype=self.lm_dtype)

    def open_tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.lm)


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
    column: Annotated[str, "column of tables that holds text or token ids"] = "text"
    split: Annotated[str, "split of a Hugging Face dataset"] = "train"
    subset: Annotated[str, "subset (name) of a Hugging Face dataset, if any"] = ""
    context: Annotated[int, "tokens per context"] = 128
    join: Annotated[bool, "whether a context may hold several documents"] = True
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

    def packing(self, *, repeat: bool) -> Packing:
        """How they are cut."""
        return Packing(self.context, self.join, self.use_bos, self.skip, repeat)

    def text(self) -> dict[str, Any]:
        """What decides the documents, as plain values."""
        names = ("dataset", "part", "column", "split", "subset", "text_seed")
        return {name: getattr(self, name) for name in names}
