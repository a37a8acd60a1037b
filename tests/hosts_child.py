"""A job of several processes that train two SAEs; `test_hosts.py` starts it.

    python -m tests.hosts_child N FOLDER "data:2,feature:2" [SIGNAL PROCESS STEP]

N processes with as many devices each as the mesh needs. If a signal is named, one of
them sends it to itself when it evaluates after that step. N = 1 is no job.
"""

import os
import signal
import sys

import jax
import numpy as np

STEPS = 12


def main(argv: list[str]) -> None:
    """One of the processes, or what starts them."""
    from sae_jax.run import hosts, job

    rest = [a for a in argv if not a.startswith("--")]
    place = dict(a[2:].split("=") for a in argv if "=" in a)
    n, folder, sizes, *trouble = rest
    if int(n) > 1 and not place:
        sys.exit(job.run([sys.executable, "-m", "tests.hosts_child", *rest], int(n)))
    from sae_jax import mesh

    sizes = mesh.parse(sizes.split(","))
    n_devices = int(np.prod(list(sizes.values())))
    jax.config.update("jax_num_cpu_devices", n_devices // int(n))
    if place:
        index = int(place["process"])
        hosts.join(place["coordinator"], int(place["processes"]), index)
    train(folder, sizes, trouble)


def train(folder: str, sizes: dict[str, int], trouble: list[str]) -> None:
    """Trains, or goes on."""
    from sae_jax import SAE, mesh
    from sae_jax.activations.in_memory import InMemory
    from sae_jax.run.devices import OnMesh
    from sae_jax.run.in_folder import train_in_folder
    from sae_jax.run.loop import Every
    from sae_jax.run.members import Member
    from sae_jax.run.stop import Stop
    from sae_jax.training.recipe import Recipe

    x = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    saes = SAE(8, 32, "jump_relu"), SAE(8, 32, "relu(coef=0.05)")
    members = {
        "jump": Member(saes[0], "x", seed=1),
        "weak": Member(saes[1], "x", seed=2),
        "weaker": Member(saes[1], "x", seed=3, lr=1e-3),
    }
    if mesh.MEMBER in sizes:
        members.pop("jump")  # there is no other to be spread with
    devices = OnMesh(mesh.make(sizes))
    seen = []

    def evaluate(name: str, *_: object) -> dict[str, float]:
        seen.append(name)
        return {}

    class Stream(InMemory):
        def position(self, t):
            if trouble and t == int(trouble[2]) and me == int(trouble[1]):
                os.kill(os.getpid(), signal.Signals[trouble[0]])
            return super().position(t)

    me = jax.process_index()
    with Stop() as stop:
        train_in_folder(
            folder,
            {},
            members,
            Stream({"x": x}, batch=32, seed=4, share=devices.share),
            Recipe(steps=STEPS, lr=1e-2),
            stop=stop,
            every=Every(log=3, evaluate=5, save=4),
            evaluate=evaluate,
            devices=devices,
            progress=False,
        )
    assert seen[-len(members) :] == list(members), "each process evaluates all"


if __name__ == "__main__":
    main(sys.argv[1:])
