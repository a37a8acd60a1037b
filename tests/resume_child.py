"""A small training run as a process of its own, for `test_resume.py` to stop.

python -m tests.resume_child FOLDER ACTIVATIONS SLOW

ACTIVATIONS is a folder of shards, or "text" for a language model that runs along. SLOW
names what takes long, so that a signal meets it. What begins is printed.
"""

import sys
import time
from functools import partial

import jax

from sae_jax import Rule, from_pre, register
from sae_jax.activations import FromShards, Shards
from sae_jax.model import SAE
from sae_jax.run.checkpoints import Checkpoints
from sae_jax.run.in_folder import train_in_folder
from sae_jax.run.loop import Every
from sae_jax.run.members import Member
from sae_jax.run.stop import Stop
from sae_jax.training.recipe import Recipe

FOLDER, ACTIVATIONS, SLOW = sys.argv[1:]
STEPS, SAVE, LONG = 60, 5, 60.0
say = partial(print, flush=True)


def long_chain(pre, *, amount: float = 0.01):
    """Takes the compiler many seconds."""
    for _ in range(150):
        pre = jax.numpy.sort(pre, axis=1)[:, ::-1] - amount
    return jax.nn.relu(pre)


register(
    Rule(
        "long_chain",
        paper="none: slow to compile",
        decides="sign",
        encode=from_pre(long_chain),
        example={"amount": 0.01},
        knob="amount",
        aux_k=False,
    )
)


class Paced:
    """A stream with time between its batches, and before the first."""

    def __init__(self, stream):
        self._stream = stream
        self.batch, self.widths = stream.batch, stream.widths
        self.position = stream.position

    def batches(self, start=0, position=None):
        say("warming up")
        if SLOW == "first batch":
            time.sleep(LONG)
        for t, rows in enumerate(self._stream.batches(start, position), start=start):
            say(f"batch {t}")
            time.sleep(0.01)
            yield rows


class Slow(Checkpoints):
    """What begins to save says so."""

    def save(self, step, state, notes):
        say(f"save {step}")
        if "save" in SLOW:
            time.sleep(LONG)
        super().save(step, state, notes)

    def wait(self):
        if "save" in SLOW:
            time.sleep(LONG)
        super().wait()


def evaluate(name, sae, variables):
    """A score; the first one may take long."""
    say("evaluating")
    if SLOW == "evaluation":
        time.sleep(LONG)
    return {"size": float(jax.numpy.abs(variables.params["W_enc"]).sum())}


def compile_aloud(lowered, *args, **options):
    say("compiling")
    return real_compile(lowered, *args, **options)


real_compile, jax.stages.Lowered.compile = jax.stages.Lowered.compile, compile_aloud


def main() -> None:
    with Stop() as stop:
        say("started")
        if SLOW == "start":
            time.sleep(LONG)
        if ACTIVATIONS == "text":
            from tests.toys import on_the_fly  # slow to import

            stream = on_the_fly()
        else:
            stream = FromShards(Shards(ACTIVATIONS), batch=6)
        widths = stream.widths
        near, far = widths
        members = {
            "near": Member(SAE(widths[near], 32, "batch_topk(k=3)"), near),
            "across": Member(
                SAE(widths[near], 24, "topk(k=2)", d_out=widths[far]), near, far, seed=1
            ),
        }
        if "compilation" in SLOW:
            members = {"chain": Member(SAE(widths[near], 32, "long_chain"), near)}
        train_in_folder(
            FOLDER,
            {"activations": ACTIVATIONS, "steps": STEPS},
            members,
            Paced(stream),
            Recipe(steps=STEPS, lr=1e-2),
            stop=stop,
            every=Every(log=7, evaluate=20, save=SAVE),
            evaluate=evaluate,
            progress=False,
        )
        say("done")


if __name__ == "__main__":
    import sae_jax.run.in_folder as in_folder

    in_folder.Checkpoints = Slow
    main()
