"""The small GPT-2 that the package carries."""

import itertools
import json

import jax
import numpy as np
from safetensors import safe_open

from sae_jax.lm.files import model_folder
from sae_jax.lm.flax_lm import FlaxLM
from sae_jax.text import Packing, load_tokenizer, open_documents
from sae_jax.text.contexts import contexts

FOLDER = model_folder("embedded")
REPORT = json.loads((FOLDER / "report.json").read_text())


def test_it_is_small_and_half_precision_and_comes_out_in_float32():
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    assert size <= 6_000_000
    with safe_open(FOLDER / "model.safetensors", framework="numpy") as file:
        names = list(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
    assert kinds == {"BF16"}
    lm = FlaxLM.load()
    assert {str(p.dtype) for p in jax.tree.leaves(lm.params)} == {"float32"}
    assert lm.n_layers == 4
    assert lm.width("resid_post.3") == 192


def test_its_tokenizer_loses_nothing():
    tokenizer = load_tokenizer()
    text = "def f(x):\n\treturn 'ä→中' + x  # naïve\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 4096
    assert tokenizer.bos_token_id == 0


def test_it_models_text_that_it_has_not_seen():
    """Better by far than counting, whatever Python the held-out files are of."""
    nats = REPORT["nats_per_token"]
    assert nats["model"] < nats["bigram"] - 1 < nats["unigram"] - 2
    lm, tokenizer = FlaxLM.load(), load_tokenizer()
    packing = Packing(length=256, repeat=False)
    stream = contexts(open_documents(part="heldout"), tokenizer, packing)
    every_tenth = itertools.islice(stream, 0, None, 10)
    rows = np.stack([context.tokens for context in every_tenth])
    found = float(lm.run(rows, losses=True).losses.mean())
    assert abs(found - nats["model"]) < 0.35
