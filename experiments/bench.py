"""Times training steps: ours beside SAELens, sparsify and a dense PyTorch Top-AFA.

All systems get the same rows (sums of known directions, some of them in most rows), the
same first weights, Adam with a learning rate of 3e-4 and the same threads; what each of
them does in a step is said in `_bench_ours`, `_bench_peers` and `_bench_dense_top_afa`.
Each works in a process of its own and is asked for one step at a time, in turn, so that
load which comes and goes meets all of them; ratios are medians of those within a round.
Steps of milliseconds still need a quiet machine: threads of PyTorch wait for one
another, and lose more than ours where something else holds a core. The floor is the
encoder's product alone, by JAX. Rules of your own, in `rule_files`, are timed too.

Command:  make bench         (builds .venv-saelens and .venv-sparsify first)
Hardware: Linux, 2 CPU cores, 10 GB, some 40 minutes; or a GPU that both JAX and
          PyTorch see.
Leaves:   runs/bench/bench.json, bench.png

Columns of a row: rule; B rows in a batch; D their width; F features; k (none where the
rule has no budget); pieces of a batch that ours takes one after another; ms, ms_min,
ms_max: median, least and most of our steps; peer; ratio_to_peer and
ratio_to_encoder_matmul: our time over theirs; peak_mb, peer_peak_mb: memory at the
highest point of the timed steps over that of the bare process, in 10^6 bytes (building
and compiling come before, and give back what they can); peer_ms; compile_s: seconds of
our first step. Beside the rows, first_mse has the mean-MSE of the first batch, which
must be the same for all systems.
"""

import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from experiments import _bench_data, _bench_figure, _bench_timing
from experiments._bench_timing import FLOOR, OURS, Timed
from experiments._bench_workers import Task
from sae_jax import RULES, SAE, registry, rules, settings
from sae_jax.binding import BoundRule
from sae_jax.settings import Spec
from sae_jax.whole_files import write_whole

Peer = Literal["sparsify", "saelens", "dense_top_afa"]
# The rules that others have too; any other is timed alone.
PEERS: dict[str, tuple[Peer, ...]] = {
    "topk": ("sparsify", "saelens"),
    "batch_topk": ("saelens",),
    "matryoshka": ("saelens",),
    "relu": ("saelens",),
    "jump_relu": ("saelens",),
    "gated": ("saelens",),
    "top_afa": ("dense_top_afa",),
}

# Those that keep arrays of codes for all rows of a batch, unless it is cut; how many
# times `rows_at_once` they take. Of Top-AFA larger pieces are quicker.
IN_PIECES = {"relu": 1, "jump_relu": 1, "gated": 1, "top_afa": 4}


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/bench"
    sizes: Annotated[tuple[str, ...], "rows x width x features"] = (
        "1024x768x12288",
        "4096x768x12288",
        "1024x768x49152",
    )
    ks: Annotated[tuple[int, ...], "budgets, for rules that have one"] = (32, 128)
    rules: Annotated[
        tuple[Spec, ...], "rules to time; none given: all that are registered"
    ] = ()
    rule_files: Annotated[
        tuple[str, ...], "Python files with rules of your own, by commas"
    ] = ()
    peers: Annotated[tuple[Peer, ...], "whom to time beside ours"] = (
        "sparsify",
        "saelens",
        "dense_top_afa",
    )
    saelens_python: Annotated[str, "interpreter that has sae_lens"] = (
        ".venv-saelens/bin/python"
    )
    sparsify_python: Annotated[str, "interpreter that has sparsify"] = (
        ".venv-sparsify/bin/python"
    )
    rounds: Annotated[int, "how often each is timed, at most"] = 5
    seconds: Annotated[
        float, "no new round of a configuration after these, and 3 rounds"
    ] = 40.0
    threads: Annotated[int, "cores for each of them; 0: all"] = 0
    huge_pages: Annotated[bool, "let glibc ask for huge pages, in all processes"] = (
        False
    )
    dtype: Annotated[
        Literal["float32", "bfloat16"], "type of the operands of matrix products"
    ] = "float32"
    compile_peers: Annotated[bool, "torch.compile for SAELens"] = False
    rows_at_once: Annotated[
        int,
        "rows of a piece of a batch, for our dense rules, of Top-AFA four times as "
        "many; 0: whole batches",
    ] = 128

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        for name in ("rounds", "sizes"):
            if not getattr(self, name):
                yield f"{name}: nothing would be timed"
        sizes = [size for size in self.sizes if not _well_formed(size)]
        for size in sizes:
            yield f"sizes: {size!r} is not rows x width x features: 1024x768x12288"
        if not sizes:
            try:
                cases(self)
            except ValueError as error:
                yield from (f"rules: {line}" for line in str(error).splitlines())


def _well_formed(size: str) -> bool:
    parts = size.split("x")
    return len(parts) == 3 and all(p.isdecimal() and int(p) > 0 for p in parts)


class Case(NamedTuple):
    """One configuration: a rule with its budget, a size, pieces of a batch."""

    bound: BoundRule
    size: tuple[int, int, int]
    pieces: int

    @property
    def k(self) -> float | None:
        """The budget, if the rule has one."""
        return self.bound.hp.get(self.bound.rule.budget)

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        sizes = zip("BDF", self.size, strict=True)
        return {"rule": self.bound.rule.name, **dict(sizes), "k": self.k}

    @property
    def text(self) -> str:
        """The configuration in words."""
        return f"{self.bound.spec} {'x'.join(map(str, self.size))}"


def cases(config: Config) -> list[Case]:
    """All that is to be timed, size by size."""
    specs = config.rules or list(RULES)
    found = []
    for size in config.sizes:
        batch, width, n_features = map(int, size.split("x"))
        for spec in specs:
            name, arguments = registry.parse_spec(spec)
            budget = rules.parse(spec).rule.budget
            each = [{budget: k} for k in config.ks] if budget else [{}]
            for more in each:
                text = registry.format_spec(name, {**arguments, **more})
                sae = SAE(width, n_features, text)  # which says what does not fit
                n = n_pieces(name, batch, config)
                found.append(Case(sae.bound, (batch, width, n_features), n))
    return found


def n_pieces(rule: str, batch: int, config: Config) -> int:
    """As many as leave no more rows in a piece than wanted, all of one size."""
    most = IN_PIECES.get(rule, 0) * config.rows_at_once or batch
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)


def run(config: Config) -> list[dict[str, Any]]:
    """Times all, one configuration after another; prints and stores as it goes."""
    pythons = interpreters(config)
    report: dict[str, Any] = {
        "command": command(config),
        "settings": asdict(config),
        "machine": machine(config),
        "versions": {},
        "first_mse": {},
        "rows": [],
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    print(_bench_timing.line({name: name for name in _bench_timing.COLUMNS}))
    for case, timed in each(cases(config), config, pythons):
        report["versions"] |= timed.versions
        report["machine"]["device"] = timed.device
        report["first_mse"][case.text] = timed.first_mse
        columns = case.columns | {"pieces": case.pieces}
        rows = _bench_timing.in_rows(columns, timed)
        report["rows"] += rows
        write_whole(out / "bench.json", json.dumps(report, indent=1) + "\n")
        for row in rows:
            print(_bench_timing.line(row), flush=True)
    _bench_figure.draw(report, out / "bench.png")
    return report["rows"]


def each(
    found: Iterable[Case], config: Config, pythons: dict[str, str]
) -> Iterator[tuple[Case, Timed]]:
    """Times one case after another; those of one size share their data."""
    with tempfile.TemporaryDirectory() as folder:
        written = None
        for case in found:
            if case.size != written:
                _bench_data.write(Path(folder), *case.size)
                written = case.size
            yield (
                case,
                _bench_timing.measure(
                    workers(case, config, pythons),
                    task(case, config, folder),
                    config.rounds,
                    config.seconds,
                    environment(config),
                ),
            )


def interpreters(config: Config) -> dict[str, str]:
    """The Python of each peer; an error at once if one is not there."""
    found: dict[str, str] = {
        "sparsify": config.sparsify_python,
        "saelens": config.saelens_python,
        "dense_top_afa": config.sparsify_python,
    }
    for peer in config.peers:
        if not Path(found[peer]).exists():
            raise FileNotFoundError(
                f"{found[peer]!r}, the interpreter for {peer}, does not exist; `make "
                f"bench` builds it, and --peers= times ours alone"
            )
    # Links are left alone: by its link Python finds its environment.
    return {peer: str(Path(found[peer]).absolute()) for peer in config.peers}


def workers(
    case: Case, config: Config, pythons: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """How to start each system of a configuration, ours first and the floor last."""
    own = (sys.executable, "experiments._bench_ours")
    peers = [p for p in PEERS.get(case.bound.rule.name, ()) if p in config.peers]
    return {
        OURS: (*own, "ours"),
        **{p: (pythons[p], "experiments._bench_peers", p) for p in peers},
        FLOOR: (*own, "floor"),
    }


def task(case: Case, config: Config, folder: str) -> Task:
    """What all workers of a configuration are told."""
    return Task(
        rule=case.bound.rule.name,
        spec=case.bound.spec,
        values=case.bound.hp,
        batch=case.size[0],
        n_features=case.size[2],
        folder=folder,
        threads=n_threads(config),
        dtype=config.dtype,
        compile_peers=config.compile_peers,
        rule_files=tuple(str(Path(file).absolute()) for file in config.rule_files),
        accumulate=case.pieces,
    )


def n_threads(config: Config) -> int:
    """Cores for each system."""
    return config.threads or len(os.sched_getaffinity(0))


def environment(config: Config) -> dict[str, str]:
    """Variables of all workers; on a GPU several share its memory."""
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if config.huge_pages else {}
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **pages}


def command(config: Config) -> str:
    """What to type for the same again."""
    default = {s.flag: s.value for s in settings.declared(Config())}
    changed = [
        f" --{s.flag}={settings.show(s.value)}"
        for s in settings.declared(config)
        if s.value != default[s.flag]
    ]
    return "python launch.py --experiment=bench" + "".join(changed)


def machine(config: Config) -> dict[str, Any]:
    """What it runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [s.split(":")[1].strip() for s in lines if s.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": n_threads(config),
        "date": datetime.date.today().isoformat(),
    }
