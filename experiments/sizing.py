"""Which mesh an SAE needs: memory, communication and step time, by calculation.

For each chip, rule, width and size of the dictionary, and for each number of chips: the
mesh with the shortest step among those that fit, and which axis to double next. The
formulas of memory and communication are compared with what XLA says of compiled steps
(`tests/on_devices/test_sizing.py`). Times are a roofline at published speeds, not a
measurement: nothing was run on a TPU. PODS.md says how to read them.

Command:  python launch.py --experiment=sizing
          python launch.py --experiment=sizing --chips=v5p --numbers=64 --batch=65536
Hardware: any; seconds. No accelerator is touched.
Leaves:   out/sizing.txt, sizing.csv

Columns of sizing.csv, sizes in bytes and seconds of one device: chip, rule, width,
n_features, chips, fits; data, feature: the mesh; held: memory in all; parameters,
moments, counters: the state; rows: of the batch; gradients, codes, exchange:
temporaries, of which the larger of the first two counts; `sent by ...`, `sent: ...`:
what a device sends in a step; compute, moving, sending, seconds: times; grow: the axis
to double. Where nothing fits, the mesh is the one that needs the least, without times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments import _roofline
from experiments._chips import CHIPS
from experiments._sizing import Split, Step
from sae_jax import SAE, Recipe, checks
from sae_jax.report.table import csv_text
from sae_jax.settings import Spec
from sae_jax.whole_files import write_whole

NOTE = """By calculation, nothing was run. GB: 1e9 bytes of one device, of which
{filled:.0%} may be filled. MB: what it sends in a step. Step: the longer of computing
and of moving memory, then sending, at the speeds that makers publish."""
HEADINGS = (
    *("F", "D", "chips", "mesh", "state GB", "all GB", "MB by data", "MB by feature"),
    *("compute ms", "moving ms", "sending ms", "step ms", "grow"),
)


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/sizing"
    chips: Annotated[tuple[str, ...], f"of {', '.join(CHIPS)}"] = tuple(CHIPS)
    numbers: Annotated[tuple[int, ...], "numbers of chips"] = (8, 32, 128, 256)
    rules: Annotated[
        tuple[Spec, ...], "rules; one with sparse codes, one with dense"
    ] = (
        Spec("topk(k=64)"),
        Spec("relu"),
    )
    features: Annotated[tuple[int, ...], "sizes of the dictionary"] = (
        *(2**17, 2**20, 2**24),
    )
    widths: Annotated[tuple[int, ...], "widths of the rows"] = (768, 2304, 4096)
    batch: Annotated[int, "rows of a step, on all chips together"] = 16_384
    accumulate: Annotated[int, "pieces of a batch, one after another"] = 1
    dtype: Annotated[Literal["float32", "bfloat16"], "type of products"] = "bfloat16"
    use_aux: Annotated[
        Literal["rule", "always", "never"], "whether dead features have a loss"
    ] = "rule"

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings."""
        for chip in self.chips:
            if chip not in CHIPS:
                yield f"chips: {checks.unknown('chip', chip, CHIPS)}"
        for name in ("numbers", "features", "widths"):
            if min(getattr(self, name), default=0) < 1:
                yield f"{name}: at least one is needed, and each must be at least 1"
        if min(self.batch, self.accumulate) < 1 or self.batch % self.accumulate:
            yield f"batch={self.batch} is not accumulate={self.accumulate} even pieces"
        try:
            for rule in self.rules:
                sae = SAE(1, max(self.features, default=1), rule)
                if sae.bound.rule.iterative:
                    yield (
                        f"rules: {rule} multiplies by the encoder many times in a "
                        f"step; these formulas count one"
                    )
        except ValueError as error:
            yield f"rules: {error}"
        if not (self.rules and self.chips):
            yield "rules, chips: nothing is asked for"


def run(config: Config) -> list[dict[str, Any]]:
    """Prints the table, and writes it."""
    rows = list(table(config))
    text = shown(config, rows)
    print(text)
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "sizing.txt", text + "\n")
    write_whole(out / "sizing.csv", csv_text(rows))
    return rows


def table(config: Config) -> Iterator[dict[str, Any]]:
    """One row for each number of chips, as far as such a slice exists."""
    recipe = Recipe(accumulate=config.accumulate, use_aux=config.use_aux)
    for name in config.chips:
        numbers = [n for n in config.numbers if n <= CHIPS[name].at_most]
        for rule in config.rules:
            for F in config.features:
                for D in config.widths:
                    sae = SAE(D, F, rule, dtype=config.dtype)
                    step = Step(sae, config.batch, recipe, Split(1, 1))
                    for n in numbers:
                        yield row(name, step, n, config.dtype)


def row(name: str, step: Step, n: int, dtype: str) -> dict[str, Any]:
    """What is said of one chip, SAE and number of chips."""
    chip, sae = CHIPS[name], step.sae
    about = {
        **{"chip": name, "rule": sae.bound.spec, "width": sae.d_in},
        **{"n_features": sae.n_features, "chips": n},
    }
    best = _roofline.fastest(step, chip, n, dtype)
    least = min(_roofline.splits(step, n), key=_roofline.held, default=None)
    found = best or least
    if found is None:
        return {**about, "fits": False}
    about |= {"fits": best is not None, **found.split._asdict()}
    about |= {"held": _roofline.held(found), **found.state(), "rows": found.rows()}
    about |= found.temporaries()
    if best is None:
        return about
    sent = {f"sent: {e.what}": e.sent for e in best.exchanges()}
    sums = {
        f"sent by {axis}": sum(e.sent for e in best.exchanges() if e.axis == axis)
        for axis in ("data", "feature")
    }
    takes = _roofline.seconds(best, chip, dtype)
    return {**about, **sums, **sent, **takes, "grow": _roofline.grow(best, chip, dtype)}


def shown(config: Config, rows: list[dict[str, Any]]) -> str:
    """The rows as text, one table for each chip and rule."""
    widths = [9, 5, 6, 9, 9, 9, 11, 14, 11, 10, 11, 9, 8]
    lines = [NOTE.format(filled=_roofline.FILLED)]
    of = None
    for r in rows:
        if of != (of := (r["chip"], r["rule"])):
            lines += [
                "",
                f"{r['rule']} on {r['chip']}, {config.batch} rows a step",
                "".join(h.rjust(w) for h, w in zip(HEADINGS, widths, strict=True)),
            ]
        texts = cells(r)
        lines.append("".join(t.rjust(w) for t, w in zip(texts, widths, strict=False)))
    return "\n".join(lines)


def cells(r: dict[str, Any]) -> list[str]:
    """The texts of one row."""
    size = [str(r["n_features"]), str(r["width"]), str(r["chips"])]
    if "held" not in r:
        return [*size, "  no mesh is even"]
    state = sum(r[term] for term in ("parameters", "moments", "counters"))
    memory = [f"{state / 1e9:.1f}", f"{r['held'] / 1e9:.1f}"]
    mesh = f"{r['data']}x{r['feature']}"
    if not r["fits"]:
        return [*size, mesh, *memory, "  does not fit"]
    sent = [f"{r[f'sent by {axis}'] / 1e6:.1f}" for axis in ("data", "feature")]
    names = ("compute", "moving", "sending", "seconds")
    return [
        *size,
        mesh,
        *memory,
        *sent,
        *(f"{1e3 * r[n]:.2f}" for n in names),
        r["grow"],
    ]
