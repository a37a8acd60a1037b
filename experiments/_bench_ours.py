"""Our side of `bench`: a training step of `sae_jax`, or the encoder's product alone.

The step is that of `Recipe` with Adam and without clipping; dead features get the
auxiliary loss if the rule's record says so. A rule that needs gradients of the model's
loss gets other rows in their place.

    python -m experiments._bench_ours ours|floor TASK
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sae_jax
from experiments._bench_workers import System, Task, peak_resident, serve, task_given


def start() -> Callable[[], int]:
    """Brings JAX up; what counts its memory."""
    jax.block_until_ready(jnp.ones((2, 2)) @ jnp.ones((2, 2)))
    device = jax.devices()[0]

    def peak() -> int:
        counted = device.memory_stats()  # none on a CPU
        return counted["peak_bytes_in_use"] if counted else peak_resident()

    return peak


def ours(task: Task) -> System:
    """A whole training step."""
    for file in task.rule_files:
        sae_jax.load_file(file)
    x, W_dec = data(task)
    sae = sae_jax.SAE(x.shape[2], task.n_features, task.spec, dtype=task.dtype)
    recipe = sae_jax.Recipe(lr=3e-4, clip=None, accumulate=task.accumulate)
    step: Any = recipe.make_step(sae)
    state = started(sae, recipe, W_dec)
    given = [{"x": jnp.asarray(rows)} for rows in x]
    if "grad_x" in sae.bound.rule.needs:  # what they are does not count here
        given = [{**batch, "grad": jnp.roll(batch["x"], 1, 0)} for batch in given]
    batches = itertools.cycle(given)

    def once() -> Any:
        nonlocal state, step
        batch = next(batches)
        if not isinstance(step, jax.stages.Compiled):
            step = step.lower(state, batch).compile()
            jax.clear_caches()  # of what only the start and tracing needed
        state, metrics = jax.block_until_ready(step(state, batch))
        return metrics["loss_mse"]

    return system(once)


def started(sae: sae_jax.SAE, recipe: sae_jax.Recipe, W_dec: np.ndarray) -> Any:
    """The state of training with the given decoder rows, for the encoder as well."""
    state = sae_jax.init_state(sae, recipe.optimiser(), jax.random.key(0))
    params = state.variables.params
    for name in {"W_enc", "W_dec"} & params.keys():
        params[name] = jnp.array(W_dec)
    return state


def floor(task: Task) -> System:
    """The product `x @ W_enc.T` and nothing else: what no step can do without."""
    x, W_dec = data(task)
    W_enc = jnp.asarray(W_dec).astype(task.dtype)
    batches = itertools.cycle([jnp.asarray(rows).astype(task.dtype) for rows in x])

    @jax.jit
    def product(rows, W_enc):
        return jnp.matmul(rows, W_enc.T, preferred_element_type=jnp.float32)

    def once() -> float:
        jax.block_until_ready(product(next(batches), W_enc))
        return float("nan")  # it reconstructs nothing

    return system(once)


def data(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Batches `[N, B, D]` and decoder rows `[F, D]`."""
    folder = Path(task.folder)
    return np.load(folder / "x.npy"), np.load(folder / "W_dec.npy")


def system(once: Callable[[], Any]) -> System:
    """The worker's answers about itself."""
    return System(once, {"jax": jax.__version__}, jax.devices()[0].device_kind)


if __name__ == "__main__":
    serve(task_given(), start, {"ours": ours, "floor": floor}[sys.argv[1]])
