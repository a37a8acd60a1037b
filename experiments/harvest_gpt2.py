"""Harvests the activations of the paper's main setting: GPT-2 small on OpenWebText.

Lee et al. 2025 train on the residual stream before blocks 6, 7 and 8: 81,924,096 rows
from contexts of 128 tokens, documents joined, BOS included. They hold nothing out; here
a tenth of the documents is kept for evaluation (--part=all: none).
Needs the Hugging Face hub, or both as local folders (--lm=DIR --dataset=DIR).

Command:  python launch.py --experiment=harvest_gpt2 --out=/data/gpt2
Hardware: not run at this size yet; needs 126 GB of disk per site in bfloat16.
"""

from dataclasses import dataclass

from experiments import harvest

run = harvest.run


@dataclass
class Config(harvest.Config):
    """As in `harvest`, with the paper's model, text and site."""

    lm: str = "gpt2"
    dataset: str = "Skylion007/openwebtext"
    sites: tuple[str, ...] = ("resid_pre.8",)
    out: str = "runs/gpt2_activations"
    rows: int = 81_924_096
    use_bos: bool = True
