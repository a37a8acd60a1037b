"""Trains the small GPT-2 that the package carries, on what every Python carries.

Shows: a byte-level BPE tokenizer and a language model from nothing; its held-out loss
beside a unigram and a smoothed bigram model of the same tokens.

Command:  python launch.py --experiment=train_lm
Hardware: 2 CPU cores, about an hour; README beside the model: figures and samples.
Expected: held out 3.15 nats per token (bigram 4.65, unigram 6.60), Python 3.11's files.
Leaves:   out/model (Hugging Face layout, bfloat16), out/loss.jsonl, out/report.json,
          out/loss.png, out/checkpoints (a killed run goes on from the last one).
"""

import json
import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from safetensors.flax import save_file
from tokenizers import ByteLevelBPETokenizer

from experiments._counting import fit_bigram, fit_unigram
from sae_jax.run.checkpoints import Checkpoints
from sae_jax.run.folder import RunFolder
from sae_jax.run.log import JsonLines, read_lines
from sae_jax.settings import to_dict
from sae_jax.text import corpus

if TYPE_CHECKING:
    # Imported where they are used: transformers takes seconds, which the manual and a
    # dry run need not wait for.
    from transformers import FlaxGPT2LMHeadModel, GPT2Config, GPT2TokenizerFast

BOS, LOG = "<|endoftext|>", "loss.jsonl"


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/train_lm"
    vocab_size: Annotated[int, "tokens of the tokenizer"] = 4096
    layers: Annotated[int, "blocks"] = 4
    width: Annotated[int, "width of the residual stream"] = 192
    heads: Annotated[int, "attention heads"] = 6
    context: Annotated[int, "tokens per context"] = 256
    batch: Annotated[int, "contexts per step"] = 8
    steps: Annotated[int, "steps in all; the learning rate's schedule ends there"] = (
        8_000
    )
    lr: Annotated[float, "highest learning rate"] = 2e-3
    warmup: Annotated[int, "steps until it is reached"] = 200
    weight_decay: Annotated[float, "of matrices"] = 0.1
    seed: Annotated[int, "of the initial weights and the order of the batches"] = 0
    eval_every: Annotated[int, "steps between evaluations and checkpoints"] = 250

    def estimates(self) -> dict[str, str]:
        """What a dry run says of size."""
        block = 12 * self.width**2 + 13 * self.width
        ends = (self.vocab_size + self.context + 2) * self.width
        tokens = self.steps * self.batch * self.context
        return {
            "parameters": f"{self.layers * block + ends:,}",
            "tokens": f"{tokens:,} ({self.steps:,} steps of {self.batch} contexts)",
        }


def run(config: Config) -> dict:
    """Trains or resumes, evaluates, and writes the model; returns the report."""
    settings = {name: v for name, v in to_dict(config).items() if name != "out"}
    with closing(RunFolder(config.out, settings)) as folder:
        return train_and_write(config, folder.path)


def train_and_write(config: Config, out: Path) -> dict:
    """What `run` does in its folder."""
    tokenizer = get_tokenizer(out / "model", config.vocab_size)
    parts = {part: flat_tokens(tokenizer, part) for part in corpus.PARTS}
    model = new_model(config)
    params = train(config, model, parts["train"].tokens, parts["validation"].tokens)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    save(model.config, params, out / "model")
    report = evaluate(model, params, config, parts)
    report["samples"] = samples(model, params, tokenizer, min(120, config.context))
    (out / "report.json").write_text(json.dumps(report, indent=1))
    plot(out)
    return report


def new_model(config: Config) -> "FlaxGPT2LMHeadModel":
    """A GPT-2 with random weights; without dropout, as it is small for its text."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    return FlaxGPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        seed=config.seed,
    )


class Flat(NamedTuple):
    """One part as one row of tokens, each document after a BOS, and its bytes."""

    tokens: np.ndarray
    n_bytes: int


def get_tokenizer(folder: Path, vocab_size: int) -> "GPT2TokenizerFast":
    """The trained tokenizer; trained on the training part if it is not there yet."""
    from transformers import GPT2TokenizerFast

    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            corpus.documents("train"),
            vocab_size=vocab_size,
            special_tokens=[BOS],
            show_progress=False,
        )
        GPT2TokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token=BOS,
            eos_token=BOS,
            unk_token=BOS,
        ).save_pretrained(folder)
    return GPT2TokenizerFast.from_pretrained(folder)


def flat_tokens(tokenizer: "GPT2TokenizerFast", part: str) -> Flat:
    """Tokens of all documents of a part, each after a BOS."""
    texts = list(corpus.documents(part))
    rows = tokenizer(texts, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    tokens = np.concatenate([np.array([bos, *row], np.int32) for row in rows])
    return Flat(tokens, sum(len(text.encode()) for text in texts))


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """The row of tokens cut into contexts; the rest at its end is left out."""
    return tokens[: len(tokens) // context * context].reshape(-1, context)


def nll(model, params, tokens):
    """Next-token losses in nats, [batch, context - 1]."""
    from sae_jax.lm.flax_lm import next_token_losses

    logits = model.module.apply(
        {"params": params},
        tokens,
        jnp.ones_like(tokens),
        jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
    ).logits
    return next_token_losses(logits, tokens)


def train(config: Config, model, tokens: np.ndarray, validation: np.ndarray):
    """Batch t is a function of the seed and t, so a resumed run sees the same."""
    rows = windows(tokens, config.context)
    order = grain.MapDataset.range(len(rows)).seed(config.seed).shuffle().repeat()
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, config.warmup, config.steps, 0.02 * config.lr
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rate,
            b2=0.98,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(lambda p: nll(model, p, batch).mean())(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    state = {"params": model.params, "opt_state": optimiser.init(model.params)}
    with closing(Checkpoints(Path(config.out) / "checkpoints")) as checkpoints:
        found = checkpoints.restore(state)
        start, state = (found.step, found.state) if found else (0, state)
        log = JsonLines(Path(config.out) / LOG, start + 1)
        losses, began = [], time.time()
        for t in range(start, config.steps):
            index = [order[t * config.batch + i] for i in range(config.batch)]
            state["params"], state["opt_state"], loss = step(
                state["params"], state["opt_state"], rows[index]
            )
            losses.append(loss)
            done = t + 1
            if done % config.eval_every == 0 or done == config.steps:
                row = {
                    "step": done,
                    "train": float(np.mean(jax.device_get(losses))),
                    "validation": mean_nll(
                        model, state["params"], windows(validation, config.context)
                    ),
                    "seconds_per_step": (time.time() - began) / len(losses),
                }
                losses, began = [], time.time()
                log.write(row)
                log.flush()
                print(row, flush=True)
                checkpoints.save(done, state, {})
        log.close()
    return state["params"]


def mean_nll(model, params, rows: np.ndarray, batch: int = 16) -> float:
    """Mean loss over all predicted tokens; the last rows are padded, not dropped."""
    loss = jax.jit(lambda p, tokens: nll(model, p, tokens))
    total = 0.0
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
        total += float(loss(params, padded)[: len(part)].sum())
    return total / (len(rows) * (rows.shape[1] - 1))


def save(model_config: "GPT2Config", params, folder: Path) -> None:
    """Hugging Face layout, with the PyTorch names that every loader knows."""
    tensors = {}
    for path, value in flatten_dict(params).items():
        *names, leaf = path
        name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf)
        # Flax keeps the kernel of Conv1D as [out, in], PyTorch as [in, out].
        value = value.T if leaf == "kernel" else value
        tensors[".".join([*names, name or leaf])] = jnp.asarray(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model_config.architectures = ["GPT2LMHeadModel"]
    model_config.save_pretrained(folder)


def evaluate(model, params, config: Config, parts: dict[str, Flat]) -> dict:
    """Held-out loss of the model and of two counting models, on the same tokens."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    validation = windows(parts["validation"].tokens, config.context)
    heldout = windows(parts["heldout"].tokens, config.context)
    tokens = parts["heldout"]
    bits = len(tokens.tokens) / tokens.n_bytes / math.log(2)
    bigram, mix = fit_bigram(parts["train"].tokens, validation, config.vocab_size)
    unigram = fit_unigram(parts["train"].tokens, config.vocab_size)
    nats = {
        "model": mean_nll(model, params, heldout),
        "bigram": float(bigram(heldout).mean()),
        "unigram": float(unigram(heldout).mean()),
    }
    return {
        "nats_per_token": nats,
        "bits_per_byte": {name: value * bits for name, value in nats.items()},
        "bigram_mix": mix,
        "tokens": {part: len(flat.tokens) for part, flat in parts.items()},
        "bytes_per_heldout_token": tokens.n_bytes / len(tokens.tokens),
    }


def samples(model, params, tokenizer, length: int) -> list[str]:
    """Text drawn at temperature 0.8 from the 40 likeliest tokens."""
    texts = []
    for i, prompt in enumerate(["def ", "class ", "The "]):
        ids = jnp.array([[tokenizer.bos_token_id, *tokenizer.encode(prompt)]])
        drawn = model.generate(
            ids,
            params=jax.tree.map(lambda p: p.astype(jnp.float32), params),
            do_sample=True,
            temperature=0.8,
            top_k=40,
            max_length=length,
            prng_key=jax.random.key(i),
            pad_token_id=tokenizer.bos_token_id,
        )
        texts.append(tokenizer.decode(drawn.sequences[0], skip_special_tokens=True))
    return texts


def plot(out: Path) -> None:
    """The loss curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_lines(out / LOG)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ("train", "validation"):
        axis.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.legend()
    figure.savefig(out / "loss.png", dpi=150)
    plt.close(figure)
