"""SAELens's own evaluation of an SAE that was trained and exported here.

    .venv/bin/python -m experiments._exchange_evals train FOLDER
    .venv-saelens/bin/python -m experiments._exchange_evals evaluate FOLDER

`train` trains TopK on the embedded language model, scores it on held-out contexts, and
leaves the export and those contexts. `evaluate` puts the same language model into
TransformerLens and lets `sae_lens.evals.run_evals` score the export on the same
contexts: L0, explained variance, and cross entropy with the SAE spliced in. (Theirs
count every position; so do these scores, BOS and the first of each context included.)
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

CONTEXTS, LENGTH, SITE = 64, 128, "resid_post.2"


def train(folder: Path) -> None:
    """Trains, scores and exports."""
    import sae_jax
    from sae_jax.activations import Harvester, OnTheFly
    from sae_jax.evaluation import Evaluator, HeldOut
    from sae_jax.lm.flax_lm import FlaxLM
    from sae_jax.text import load_tokenizer
    from sae_jax.text.contexts import Packing
    from sae_jax.text.opening import open_documents

    lm, tokenizer = FlaxLM.load("embedded"), load_tokenizer("embedded")
    packing = Packing(LENGTH, join=False, use_bos=True)
    stream = OnTheFly(
        Harvester(lm, (SITE,), contexts_per_pass=16),
        open_documents("embedded"),
        tokenizer,
        packing,
        batch=512,
        buffer=8192,
        seed=0,
    )
    recipe = sae_jax.Recipe(steps=200, lr=1e-3)
    one = sae_jax.train(stream, "topk(k=32)", n_features=768, recipe=recipe)
    held_out = HeldOut.read(
        open_documents("embedded", part="heldout"),
        tokenizer,
        packing._replace(repeat=False),
        4 * CONTEXTS,
    )
    whole = np.flatnonzero(held_out.real.all(1))[:CONTEXTS]  # theirs knows no padding
    held_out = held_out._replace(
        **{n: getattr(held_out, n)[whole] for n in ("tokens", "real", "use")}
    )
    scores = Evaluator(lm, held_out)(one.sae, one.variables, SITE).scores
    one.about.update({"lm": "embedded", "packing": packing._asdict()})
    folder.mkdir(parents=True, exist_ok=True)
    one.save(folder / "sae", "saelens")
    np.save(folder / "tokens.npy", held_out.tokens)
    print(json.dumps({name: float(value) for name, value in scores.items()}))


def evaluate(folder: Path) -> None:
    """What SAELens says of it."""
    import torch
    from datasets import Dataset
    from sae_lens import SAE, ActivationsStore
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    path = Path(__file__).parents[1] / "sae_jax" / "assets" / "small_gpt2"
    theirs = GPT2LMHeadModel.from_pretrained(path).float().eval()
    said = theirs.config
    config = HookedTransformerConfig(
        n_layers=said.n_layer,
        d_model=said.n_embd,
        n_ctx=said.n_positions,
        d_head=said.n_embd // said.n_head,
        n_heads=said.n_head,
        d_mlp=4 * said.n_embd,
        d_vocab=said.vocab_size,
        act_fn="gelu_new",
        eps=said.layer_norm_epsilon,
        normalization_type="LN",
        default_prepend_bos=False,
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_gpt2_weights(theirs, config), strict=False)
    tokens = np.load(folder / "tokens.npy").astype(np.int64)
    with torch.no_grad():
        rows = torch.from_numpy(tokens[:4])
        assert torch.allclose(model(rows), theirs(rows).logits, atol=1e-3)
    sae = SAE.load_from_disk(folder / "sae")
    store = ActivationsStore.from_sae(
        model,
        sae,
        Dataset.from_dict({"tokens": tokens.tolist()}),
        context_size=tokens.shape[1],
        store_batch_size_prompts=16,
        n_batches_in_buffer=4,
        disable_concat_sequences=True,
    )
    batches = len(tokens) // 16
    metrics, _ = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        get_eval_everything_config(16, batches, batches),
        exclude_special_tokens=False,
    )
    print(json.dumps(metrics, default=float))


def main(task: str, folder: Path) -> Any:
    """One of the two."""
    return {"train": train, "evaluate": evaluate}[task](folder)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
