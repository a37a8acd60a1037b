"""The peers of `bench_lm`, in an environment of their own; not an experiment.

Reads the name of a runner per line, runs it once, answers with the seconds.
"""

import json
import sys
import time

import torch
import transformer_lens
import transformers


def main(config: dict) -> None:
    """Builds the runners, runs each once, then serves."""
    torch.manual_seed(0)
    shape = (config["batch"], config["context"])
    tokens = torch.randint(0, config["vocab_size"], shape)
    stop = config["layer"]
    whole, cut = (
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config["vocab_size"],
                n_embd=config["width"],
                n_layer=layers,
                n_head=config["heads"],
            )
        ).eval()
        for layers in (config["layers"], stop)
    )
    lens = hooked(config)
    runners = {
        "TransformerLens, run_with_cache": lambda: lens.run_with_cache(
            tokens, stop_at_layer=stop
        )[0],
        "TransformerLens, nothing cached": lambda: lens(tokens, stop_at_layer=stop),
        "PyTorch, layers cut off": lambda: (
            cut.transformer(tokens, use_cache=False).last_hidden_state
        ),
        "PyTorch, whole model": lambda: whole.transformer(
            tokens, output_hidden_states=True, use_cache=False
        ).hidden_states[stop],
    }
    with torch.inference_mode():
        for run in runners.values():
            run()
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        answer({"names": list(runners), "versions": versions})
        for line in sys.stdin:
            start = time.perf_counter()
            runners[json.loads(line)]()
            answer({"seconds": time.perf_counter() - start})


def hooked(config: dict) -> transformer_lens.HookedTransformer:
    """GPT-2's shape with random weights, in TransformerLens."""
    return transformer_lens.HookedTransformer(
        transformer_lens.HookedTransformerConfig(
            n_layers=config["layers"],
            d_model=config["width"],
            n_ctx=1024,
            d_head=config["width"] // config["heads"],
            n_heads=config["heads"],
            d_vocab=config["vocab_size"],
            act_fn="gelu_new",
        )
    ).eval()


def answer(value: dict) -> None:
    """One line of JSON."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
