"""A process of a benchmark that may die: when it starts, in a turn, or not at all."""

import json
import sys

from experiments._bench_workers import answer

dies = json.loads(sys.argv[-1])["dies"]
if dies == "at once":
    sys.exit(3)
answer(ready=True)
for _ in sys.stdin:
    if dies == "in a turn":
        sys.exit(4)
    answer(seconds=1.0, peak_mb=2.0)
