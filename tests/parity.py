"""Replays recorded runs of the Top-AFA authors' code: `python -m tests.parity DIR`.

Each `.npz` holds initial weights, batches, outputs and gradients of the first step,
25 steps of losses, and final weights, all in float64, and as JSON the configuration.
Every recorded number is compared or listed with the reason why it cannot be. The exit
status is 1 if any deviation passes its tolerance.

Source: SewoongLee/top-afa-sae, training/sae.py and training.py, commit 2190aab.
"""

import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import SAE, AuxK, Variables, adam, init_state, make_step, to_dense
from sae_jax.training.terms import loss_terms
from tests.float32_sums import exact_sum, losses, summands, torch_sum

FIRST_STEP, TRAJECTORY, FIRST_STEP_FLOAT32 = 1e-9, 1e-7, 1e-5
# What our step reports, against the same terms in float64. It rounds to float32 up to
# six times: a code, its row's sum, the mean, the coefficient, their product, the loss.
METRICS = 6 * 2.0**-24

# Options that repeat what is unusual in the authors' code; the package's defaults
# differ. Everywhere: decoder rows are normalised before the optimiser's step, and the
# residual of AuxK is not detached.
PLAIN = {"encoder_bias": False}
RULES = {
    "vanilla": ("relu(coef={l1_coeff})", {}),
    "topk": ("topk(k={top_k})", PLAIN),
    "batchtopk": ("batch_topk(k={top_k})", PLAIN),
    "topafa": ("top_afa(coef={afa_coeff})", PLAIN),
    "jumprelu": (
        "jump_relu(coef={l1_coeff}, bandwidth={bandwidth}, variant='lee2025_code')",
        {"centre": False},
    ),
}
HAS_AUX = {"topk", "batchtopk", "topafa"}
L1_TERM = {"vanilla": "l1", "jumprelu": "l0"}
PARAMS = {"jumprelu.log_threshold": "log_threshold"}
# Loss terms that the authors' class computes and our rule of that name does not have.
FOREIGN_TERMS = {
    "topk": ("l1_coeff", "afa_coeff"),
    "batchtopk": ("l1_coeff", "afa_coeff"),
    "topafa": ("l1_coeff",),
}


class Row(NamedTuple):
    quantity: str
    deviation: float
    tolerance: float

    @property
    def passes(self) -> bool:
        return self.deviation <= self.tolerance


def deviation(ours, theirs) -> float:
    """Largest difference, relative to the largest recorded value.

    A NaN or infinity on one side only is an infinite deviation.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return np.inf
    both = np.isfinite(ours) & np.isfinite(theirs)
    same = (np.isnan(ours) & np.isnan(theirs)) | (ours == theirs)
    if not np.all(both | same):
        return np.inf
    if not both.any():
        return 0.0
    scale = max(np.abs(theirs[both]).max(), np.finfo(np.float64).tiny)
    worst = np.abs(ours[both] - theirs[both]).max()
    return float(worst if scale == np.finfo(np.float64).tiny else worst / scale)


def read(path: Path):
    """The configuration and the arrays of one file; nothing in it is unpickled.

    Their encoder has a column for each feature, ours a row.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {
            name: file[name].T if name.endswith("/W_enc") else file[name]
            for name in file.files
        }
    return json.loads(str(arrays.pop("config"))), arrays


def build(config: dict, arrays: dict, dtype: str):
    """Our SAE with their weights, and the training options that repeat their step."""
    spec, options = RULES[config["rule"]]
    n_features, d_in = arrays["init/W_enc"].shape
    sae = SAE(
        d_in,
        n_features,
        rule=spec.format(**config),
        treatment="standardise" if config["input_unit_norm"] else "none",
        dtype=dtype,
        **options,
    )
    params = {
        PARAMS.get(name, name): jnp.asarray(value, dtype)
        for name, value in group(arrays, "init/").items()
    }
    state = sae.init(jax.random.key(0)).state
    aux = AuxK(
        k=config["top_k_aux"],
        coef=config["aux_penalty"],
        dead_after=config["n_batches_to_dead"],
        detach=False,
    )
    return sae, Variables(params, state, {}), aux if has_aux(config) else None


def loss_dtypes(config: dict) -> dict[str, str]:
    """Their `.float()` rounds these terms in a float64 run; the AFA term has none."""
    terms = {"mse", "aux", L1_TERM.get(config["rule"])}
    return {name: "float32" for name in terms if name}


def has_aux(config: dict) -> bool:
    return config["rule"] in HAS_AUX


def group(arrays: dict, prefix: str) -> dict:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in values.items()}


def unreplayable(config: dict) -> dict[str, str]:
    """Recorded quantities that cannot be compared, each with its reason."""
    reasons = {}
    if config["rule"] == "jumprelu":
        reasons["traj/num_dead_features"] = (
            "their JumpReLU never updates its counter, which therefore stays at 0"
        )
    return reasons


def refusal(config: dict, arrays: dict) -> str | None:
    """Why a whole file cannot be replayed, or None."""
    if config.get("rule") not in RULES:
        return f"its rule {config.get('rule')!r} is none of {', '.join(RULES)}"
    for name in FOREIGN_TERMS.get(config["rule"], ()):
        if config[name] != 0:
            return f"{name}={config[name]} adds a term that our rule does not have"
    needed = ["init/W_enc", "init/b_enc", "init/W_dec", "init/b_dec", "x"]
    missing = [name for name in needed if name not in arrays]
    return f"it lacks {', '.join(missing)}" if missing else None


def first_step(config: dict, arrays: dict, dtype: str, tolerance: float) -> list[Row]:
    """Outputs, codes and gradients of the first batch."""
    sae, variables, aux = build(config, arrays, dtype)
    x = jnp.asarray(arrays["x"][0], dtype)
    idle = jnp.zeros(sae.n_features, jnp.int32)
    dtypes = loss_dtypes(config)

    def loss(params):
        out = sae.forward(variables._replace(params=params), x, train=True)
        return sum(loss_terms(out, None, idle, aux, dtypes=dtypes).values()), out

    grads, out = jax.grad(loss, has_aux=True)(variables.params)
    found = {
        "sae_out": out.undo(out.x_hats[-1]),
        "feature_acts": to_dense(out.codes),
        **{f"grad/{name}": grads[PARAMS.get(name, name)] for name in names(arrays)},
    }
    return [
        Row(f"step0/{name} ({dtype})", deviation(found[name], value), tolerance)
        for name, value in group(arrays, "step0/").items()
    ]


def names(arrays: dict) -> list[str]:
    return list(group(arrays, "init/"))


def trajectory(config: dict, arrays: dict) -> list[Row]:
    """Every step's losses and counts, and the final weights."""
    sae, variables, aux = build(config, arrays, "float64")
    clip = config["max_grad_norm"]
    optimiser = adam(
        config["lr"],
        b1=config["beta1"],
        b2=config["beta2"],
        eps=config["adam_eps"],
        clip=clip,
    )
    state = init_state(sae, optimiser, jax.random.key(0), variables=variables)
    step = make_step(
        sae, optimiser, aux=aux, decoder_norm="before", loss_dtypes=loss_dtypes(config)
    )
    l1 = L1_TERM.get(config["rule"])
    forward = jax.jit(functools.partial(summands, sae, aux, l1 == "l0"))
    # They log features idle for more than n batches, and revive those idle for n.
    n_idle = config["n_batches_to_dead"]
    found: dict[str, list[float]] = {}
    for x in map(jnp.asarray, arrays["x"]):
        terms = jax.device_get(forward(state.variables, state.steps_idle, x))
        state, metrics = step(state, {"x": x})
        afa = np.float64(metrics.get("loss_afa", 0))
        values = {
            **prefixed("traj/", losses(config, terms, afa, torch_sum)),
            "traj/l0_norm": metrics["l0"],
            "traj/afa_loss": afa,
            "traj/num_dead_features": (state.steps_idle > n_idle).sum(),
            **prefixed("exact/", losses(config, terms, afa, exact_sum)),
            **prefixed("metrics/", metrics),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(float(value))
    rows = [
        Row(name, deviation(found[name], value), TRAJECTORY)
        for name, value in arrays.items()
        if name.startswith("traj/") and name not in unreplayable(config)
    ]
    reported = {"l2_loss": "loss_mse", "l1_loss": f"loss_{l1}", "aux_loss": "loss_aux"}
    for name, exact in group(found, "exact/").items():
        metric = f"metrics/{reported.get(name, name)}"
        if metric in found:
            rows.append(Row(metric, deviation(found[metric], exact), METRICS))
    for name, value in group(arrays, "final/").items():
        ours = state.variables.params[PARAMS.get(name, name)]
        rows.append(Row(f"final/{name}", deviation(ours, value), TRAJECTORY))
    return rows


def replay(path: Path) -> list[Row]:
    """All comparisons of one file; needs x64 enabled."""
    config, arrays = read(path)
    return [
        *first_step(config, arrays, "float64", FIRST_STEP),
        *trajectory(config, arrays),
        *first_step(config, arrays, "float32", FIRST_STEP_FLOAT32),
    ]


def main(folder: str) -> int:
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        print(f"There is no .npz file in {folder!r}.", file=sys.stderr)
        return 1
    failed = 0
    for path in paths:
        config, arrays = read(path)
        reason = refusal(config, arrays)
        if reason:
            print(f"{path.name}\n  NOT REPLAYED: {reason}")
            failed += 1
            continue
        rows = replay(path)
        print(path.name)
        for row in rows:
            verdict = "ok" if row.passes else "FAIL"
            print(
                f"  {row.quantity:44} {row.deviation:9.2e}"
                f"  (tolerance {row.tolerance:.1e})  {verdict}"
            )
        for name, reason in unreplayable(config).items():
            print(f"  {name:44} not compared: {reason}")
        failed += sum(not row.passes for row in rows)
    print(f"{len(paths)} files, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python -m tests.parity DIR", file=sys.stderr)
        sys.exit(2)
    with jax.enable_x64(True):
        sys.exit(main(sys.argv[1]))
