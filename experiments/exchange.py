"""SAEs to other libraries and back, beside those libraries themselves.

Each library makes random SAEs of all its classes, and its codes and reconstructions of
some rows; we read them and encode the same rows. Then our SAEs of every rule, under
every treatment, are written in the library's format; it loads them by its own loader
and encodes. Reported is the largest difference of codes and of reconstructions, each
against the largest value; one above `tolerance` ends the command with an error.

Command:  make exchange      (builds .venv-saelens, .venv-sparsify and .venv-dictlearn)
Hardware: 2 CPU cores, three minutes once they are built.
Leaves:   out/exchange.json, and all SAEs below out
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import RULES, SAE, to_dense
from sae_jax.binding import bind
from sae_jax.exchange import load
from sae_jax.exchange.outward import outward
from sae_jax.formats import FORMATS
from sae_jax.trained import TrainedSAE

ROOT = Path(__file__).parent.parent
# Whose reader of the published layouts gives the codes.
INTERPRETERS = {"gemma_scope": "saelens", "openai": "saelens"}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "not centred": {"centre": False},
    "scale": {"treatment": "scale"},
    "standardise": {"treatment": "standardise"},
    "transcoder": {"d_out": 16},
}


@dataclass
class Config:
    """What can be set from the command line."""

    out: Annotated[str, "folder to write to"] = "runs/exchange"
    saelens: Annotated[str, "interpreter that has sae-lens"] = (
        ".venv-saelens/bin/python"
    )
    sparsify: Annotated[str, "interpreter that has eai-sparsify"] = (
        ".venv-sparsify/bin/python"
    )
    dictionary_learning: Annotated[str, "interpreter that has dictionary-learning"] = (
        ".venv-dictlearn/bin/python"
    )
    tolerance: Annotated[float, "largest difference, against the largest value"] = 1e-5

    def faults(self) -> Iterator[str]:
        """What is missing."""
        for peer in ("saelens", "sparsify", "dictionary_learning"):
            if not Path(getattr(self, peer)).expanduser().exists():
                yield (
                    f"{peer}={getattr(self, peer)!r} does not exist; `make exchange` "
                    f"builds it"
                )


class Row(NamedTuple):
    """A line of the table: differences, or the reason why there are none."""

    library: str
    way: str
    case: str
    codes: float | None
    x_hat: float | None
    remark: str


def run(config: Config) -> list[Row]:
    """Both ways for every library; prints and stores the table."""
    out = Path(config.out).expanduser().resolve()
    rows, versions = [], {}
    for library in sorted(set(FORMATS) - {"sae_jax"}):
        folder = out / library
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "theirs").mkdir(parents=True)
        versions |= peer(config, library, "make", folder / "theirs")
        rows += read_theirs(library, folder / "theirs")
        if FORMATS[library].write is not None:
            remarks = write_ours(library, folder / "ours")
            versions |= peer(config, library, "read", folder / "ours")
            rows += compared(library, folder / "ours", remarks)
    for row in rows:
        numbers = row.remark
        if row.codes is not None:
            numbers = f"codes {row.codes:.1e}  reconstruction {row.x_hat:.1e}"
        print(f"{row.library:20} {row.way:12} {row.case:36} {numbers}", flush=True)
    wrong = [row for row in rows if not within(row, config.tolerance)]
    measured = sum(row.codes is not None for row in rows)
    print(
        f"\n{measured} SAEs compared, {len(rows) - measured} refused with a reason, "
        f"{len(wrong)} wrong (tolerance {config.tolerance:g}); {versions}"
    )
    report = {"config": asdict(config), "versions": versions}
    report["rows"] = [row._asdict() for row in rows]
    (out / "exchange.json").write_text(json.dumps(report, indent=1))
    if wrong:
        names = ", ".join(f"{row.library} {row.case}" for row in wrong)
        raise ValueError(f"Not the same codes or reconstructions: {names}.")
    return rows


def within(row: Row, tolerance: float) -> bool:
    """Whether nothing differs; NaN is different."""
    if row.codes is None or row.x_hat is None:
        return True
    return max(row.codes, row.x_hat) <= tolerance


def peer(config: Config, library: str, task: str, folder: Path) -> dict[str, str]:
    """Runs a library's part in its own environment; gives its versions."""
    interpreter = getattr(config, INTERPRETERS.get(library, library))
    done = subprocess.run(
        [
            os.path.abspath(Path(interpreter).expanduser()),
            *("-m", "experiments._exchange_peers", library, task, str(folder)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{interpreter} failed:\n{done.stderr.strip()[-2000:]}")
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def read_theirs(library: str, folder: Path) -> Iterator[Row]:
    """Their SAEs in our hands."""
    for case in sorted(path.parent for path in folder.rglob("expected.npz")):
        expected, name = arrays(case / "expected.npz"), case.name
        files = {".safetensors", ".pt", ".npz"}
        (at,) = {
            path.parent
            for path in case.rglob("*")
            if path.suffix in files and path.name != "expected.npz"
        }
        try:
            read = load(at)
        except ValueError as error:
            remark = f"refused: {one_line(error)}"
            yield Row(library, "read here", name, None, None, remark)
            continue
        yield Row(library, "read here", name, *differences(read, expected), "")


def write_ours(library: str, folder: Path) -> dict[str, str]:
    """Ours in their format, with rows to encode; why some are refused."""
    remarks: dict[str, str] = {}
    for number, (case, one) in enumerate(ours()):
        plain = case.split(", ")[0]
        if plain != case and not remarks[plain].isdecimal():
            continue  # refused without any option, which is said once
        to = folder / f"{number:03}"
        to.mkdir(parents=True)
        try:
            one.save(to / "sae", library)
        except ValueError as error:
            remarks[case] = f"refused: {one_line(error)}"
            shutil.rmtree(to)
            continue
        x = sample(9)
        x_hat, codes = one.sae.apply(one.variables, jnp.asarray(x))
        np.save(to / "x.npy", x)
        in_theirs = to_dense(codes) * units(one, library)
        np.savez(to / "ours.npz", codes=in_theirs, x_hat=x_hat)
        remarks[case] = str(number)
    return remarks


def units(one: TrainedSAE, library: str) -> np.ndarray:
    """By how much the rows of our decoder are longer than those that are written.

    Codes count in units of those: 1, but for a rule that writes rows of norm 1.
    """
    outside = outward(one, library)
    held = outside.weights["W_dec"]
    written = outside.counterpart.arrays.get("W_dec", held)
    found: np.ndarray = np.linalg.norm(held, axis=1) / np.linalg.norm(written, axis=1)
    return found


def ours() -> Iterator[tuple[str, TrainedSAE]]:
    """SAEs of every rule and option, away from where they start, with memory."""
    for name in RULES:
        bound = bind(RULES[name], RULES[name].example)
        for option, settings in OPTIONS.items():
            case = f"{name}, {option}" if option else name
            try:
                sae = SAE(16, 64, rule=bound, **settings)
            except ValueError:  # a rule that needs an autoencoder
                continue
            start = jnp.asarray(sample(1))
            made = sae.init(jax.random.key(0), sample=start, target_sample=start)
            params = {
                part: value + 0.1 * jax.random.normal(jax.random.key(i), value.shape)
                for i, (part, value) in enumerate(sorted(made.params.items()))
            }
            made = made._replace(params=params)
            if made.state:
                target = start if sae.is_transcoder else None
                key, grad = jax.random.key(2), jnp.cos(start)
                out = sae.forward(
                    made, start, target=target, grad_x=grad, key=key, train=True
                )
                made = made._replace(state=out.state)
            yield case, TrainedSAE(sae, made, {"site": "resid_post.3", "lm": "gpt2"})


def arrays(path: Path) -> dict[str, np.ndarray]:
    """What an npz file holds; it is closed again."""
    with np.load(path) as file:
        return dict(file)


def sample(seed: int) -> np.ndarray:
    """Rows with a mean, on no special scale."""
    rng = np.random.default_rng(seed)
    return (1.5 * rng.normal(size=(48, 16)) + 0.3).astype(np.float32)


def compared(library: str, folder: Path, remarks: dict[str, str]) -> Iterator[Row]:
    """Our SAEs in their hands."""
    for case, remark in remarks.items():
        if not remark.isdecimal():
            yield Row(library, "read there", case, None, None, remark)
            continue
        at = folder / f"{int(remark):03}"
        found, known = arrays(at / "found.npz"), arrays(at / "ours.npz")
        pair = [relative(found[part], known[part]) for part in ("codes", "x_hat")]
        yield Row(library, "read there", case, *pair, "")


def differences(read: TrainedSAE, expected: Any) -> list[float]:
    """Of codes and of reconstructions."""
    x_hat, codes = read.sae.apply(read.variables, jnp.asarray(expected["x"]))
    found = {"codes": to_dense(codes), "x_hat": x_hat}
    return [relative(np.asarray(found[n]), expected[n]) for n in ("codes", "x_hat")]


def relative(found: np.ndarray, known: np.ndarray) -> float:
    """The largest difference against the largest value; other shapes are all wrong."""
    if found.shape != known.shape or not np.abs(known).max() > 0:
        return float("inf")
    return float(np.abs(found - known).max() / np.abs(known).max())


def one_line(error: ValueError) -> str:
    """The reason in an error: without the folder it was about, and the way out."""
    said = str(error).splitlines()[0].split(" save(folder)")[0]
    return said if said.startswith("/") else said.split(": ", 1)[-1]
