"""A run in a folder: what `Loop` needs, opened there; what it leaves, saved there."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from sae_jax import checks
from sae_jax.run import hosts
from sae_jax.run.checkpoints import Checkpoints
from sae_jax.run.devices import ONE_DEVICE, OneDevice
from sae_jax.run.folder import RunFolder
from sae_jax.run.log import JsonLines, Log, TensorBoard, Timing, Wandb, read_lines
from sae_jax.run.loop import EVERY, Evaluate, Every, Loop
from sae_jax.run.members import Member, Stream
from sae_jax.run.profile import Profile
from sae_jax.run.stop import Stop
from sae_jax.trained import TrainedSAE
from sae_jax.training.recipe import Recipe

METRICS = "metrics.jsonl"


def train_in_folder(
    path: str | Path,
    config: dict[str, Any],
    members: Mapping[str, Member],
    stream: Stream,
    recipe: Recipe,
    *,
    stop: Stop | None = None,
    every: Every = EVERY,
    evaluate: Evaluate | None = None,
    about: Mapping[str, Any] | None = None,
    wandb: str = "",
    profile: int = 0,
    devices: OneDevice = ONE_DEVICE,
    progress: bool = True,
) -> dict[str, TrainedSAE]:
    """Trains, or goes on training, and saves the SAEs below `path`.

    Args:
      path: the run's folder; see `RunFolder`.
      config: every setting; the folder is refused to a run with others.
      members: the SAEs; see `Loop`, also for what follows.
      stream: where batches come from.
      recipe: how they are trained.
      stop: entered by a caller who wants signals to save and end the process.
      every: how often to log, evaluate and save.
      evaluate: called with the name, description and arrays of a member.
      about: provenance, kept with every SAE.
      wandb: project of Weights & Biases, if metrics go there as well.
      profile: how many steps to trace, into the folder's `profile`.
      devices: where to train; see `sae_jax.run.devices`.
      progress: whether to show a bar.
    """

    def logs(start: int) -> Sequence[Log]:
        if not hosts.first():
            return []
        opened: list[Log] = [
            JsonLines(folder / METRICS, start),
            TensorBoard(folder / "tensorboard", start),
        ]
        if wandb:
            opened.append(Wandb(folder.path, wandb, config))
        return opened

    checks.raise_all(
        f"{name!r} cannot be the name of an SAE, since a folder is named after it; "
        f"take letters, digits and any of _ - + = . : ( ) ,"
        for name in members
        if not re.fullmatch(r"[\w(][\w.+=(), :-]*", name)
    )
    folder = RunFolder(path, config)
    checkpoints = Checkpoints(folder / "checkpoints", keep=every.keep)
    with ExitStack() as opened:
        opened.callback(folder.close)
        opened.callback(checkpoints.close)
        timing = None
        if hosts.first():
            timing = opened.enter_context(closing(Timing(folder / "timing.jsonl")))
        trained = Loop(
            members,
            stream,
            recipe,
            every=every,
            logs=logs,
            checkpoints=checkpoints,
            evaluate=evaluate,
            timing=timing,
            stop=stop,
            profile=Profile(folder / "profile", profile) if profile else None,
            devices=devices,
            progress=progress,
        ).run()
        if not hosts.first():
            return trained
        lines = read_lines(folder / METRICS)  # those before a resume as well
        for name, one in trained.items():
            history = [line for line in lines if line["sae"] == name]
            scores = [line for line in history if line["kind"] == "eval"]
            known = {**(about or {}), **one.about, "scores": (scores or [{}])[-1]}
            trained[name] = dataclasses.replace(one, about=known, history=history)
            trained[name].save(folder / "saes" / name)
    return trained
