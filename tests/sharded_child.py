"""Rows that lie on eight devices are measured, for `test_evaluation.py`.

python -m tests.sharded_child

Prints, for each rule, on how many devices the rows were, and the scores of the same
rows on one device and on all of them.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax.evaluation import Measurement
from tests.row_oracle import case, mean_of

RULES = ("relu", "topk(k=3)")  # dense codes, and sparse ones


def main() -> None:
    spread = NamedSharding(Mesh(np.array(jax.devices()), "rows"), PartitionSpec("rows"))
    found = {}
    for spec in RULES:
        c = case(spec, n=40, treatment="scale")
        mask = np.arange(40) % 7 != 3
        scores = []
        for x in (jnp.asarray(c.x), jax.device_put(c.x, spread)):
            measurement = Measurement(c.sae, c.variables, mean_of(x, mask))
            for _ in range(2):
                measurement.add(x, mask=mask)
            scores.append(measurement.finish().scores)
        found[spec] = [len(x.sharding.device_set), *scores]
    print(json.dumps(found))


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
