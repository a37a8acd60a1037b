"""A process of `bench_ensemble`, not an experiment: trains SAEs on a language model.

Which ones its settings say: one SAE, or all. A turn is one block of the stream.

    python -m experiments._bench_ensemble_process SETTINGS
"""

import json
import sys

from experiments._bench_steps import Steps
from experiments._bench_workers import answer, forget_peak, peak_resident
from experiments.bench_ensemble import RECIPE, Config, as_frontier
from sae_jax.run.groups import grouped


def main(config: Config) -> None:
    """Builds all, trains on a first block, then on one for each line that comes."""
    settings = as_frontier(config)
    stream = settings.open_stream(settings.open_lm(), settings.open_tokenizer())
    members = settings.members(stream.widths)
    steps = Steps(grouped(members, RECIPE), stream.batches())
    in_a_turn = config.buffer // config.batch
    steps(in_a_turn)
    forget_peak()
    answer(width=stream.widths[config.site])
    for _ in sys.stdin:
        seconds = steps(in_a_turn)
        answer(seconds=seconds, peak_mb=peak_resident() / 1e6)


if __name__ == "__main__":
    main(Config(**json.loads(sys.argv[-1])))
