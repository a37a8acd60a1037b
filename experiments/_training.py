"""What the experiments that train SAEs on a language model have in common.

A subclass of `Config` says which SAEs (`wanted`); all of them see the same batches.
"""

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax

from experiments._estimates import estimates
from experiments._streams import open_stream, shard_faults, widths
from sae_jax import mesh, rules
from sae_jax.activations import FromShards, OnTheFly
from sae_jax.config import (
    Data,
    Dictionary,
    Evaluating,
    ModelConfig,
    Reporting,
    TextConfig,
)
from sae_jax.evaluation import Evaluation, Evaluator
from sae_jax.model import SAE
from sae_jax.run import hosts, profile
from sae_jax.run.devices import OneDevice, OnMesh, Pmap
from sae_jax.run.folder import folder_fault
from sae_jax.run.in_folder import train_in_folder
from sae_jax.run.loop import EVERY, Every
from sae_jax.run.members import Member
from sae_jax.run.stop import Stop
from sae_jax.settings import to_dict
from sae_jax.share import WHOLE, Share
from sae_jax.trained import TrainedSAE
from sae_jax.training.recipe import Recipe
from sae_jax.variables import Variables


class Wanted(NamedTuple):
    """One SAE that an experiment asks for."""

    rule: str
    site: str
    target: str | None = None
    seed: int = 0
    lr: float | None = None
    n_features: int | None = None


@dataclass
class Config(ModelConfig, TextConfig):
    """Settings of every such experiment; those of `beside` change no SAE."""

    beside: ClassVar[tuple[str, ...]] = (
        "out",
        "wandb",
        "profile",
        "mesh",
        "runner",
        "at_once",
        "report",
    )

    out: Annotated[str, "the run's folder; the same command goes on with it"] = ""
    rule_files: Annotated[
        tuple[str, ...], "Python files with rules of your own, by commas"
    ] = ()
    wandb: Annotated[
        str, "project of Weights & Biases to log to as well (needs the package)"
    ] = ""
    profile: Annotated[
        int, "steps to trace, for a table of where their time goes; 0: none"
    ] = 0
    mesh: Annotated[
        tuple[str, ...],
        "devices: rows spread over data, features over feature, SAEs over member, as "
        "data:4,feature:2; none: one device",
    ] = ()
    runner: Annotated[
        Literal["jit", "pmap"], "pmap: all devices, each with all parameters"
    ] = "jit"
    at_once: Annotated[
        int,
        "SAEs that are alike computed at once; 0: one on a CPU, elsewhere many",
    ] = 0
    sae: Dictionary = Dictionary()
    data: Data = Data()
    train: Recipe = Recipe()
    every: Every = EVERY
    evaluation: Evaluating = Evaluating()
    report: Reporting = Reporting()

    def wanted(self) -> list[Wanted]:
        """The SAEs to train."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What makes a run the same run, wherever its folder is."""
        values = to_dict(self)
        files = [Path(file).read_bytes() for file in self.rule_files]
        values["rule_files"] = [hashlib.sha256(file).hexdigest() for file in files]
        return {n: value for n, value in values.items() if n not in self.beside}

    def read_sites(self) -> tuple[str, ...]:
        """All sites that are read."""
        found = [s for w in self.wanted() for s in (w.site, w.target) if s]
        return tuple(dict.fromkeys(found))

    def graded_sites(self) -> tuple[str, ...]:
        """Those where a rule needs the gradient of the model's loss."""
        found = [
            w.site for w in self.wanted() if "grad_x" in rules.parse(w.rule).rule.needs
        ]
        return tuple(dict.fromkeys(found))

    def faults(self) -> Iterator[str]:
        """What is wrong with these settings together."""
        if self.wandb and importlib.util.find_spec("wandb") is None:
            yield "wandb needs a package: pip install -e '.[wandb]'"
        if self.source == "torch" and importlib.util.find_spec("torch") is None:
            yield "source=torch needs a package: pip install -e '.[torch]'"
        for name in ("profile", "at_once"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must not be negative"
        yield from self.train.faults(self.data.batch)
        yield from self.text_faults()
        yield from shard_faults(self)
        faults = self.model_faults(self.read_sites(), self.context)
        yield from faults or self.misfits()

    def conflicts(self) -> list[str]:
        """What is asked for once nothing else is wrong."""
        fault = folder_fault(self.out, self.identity())
        return [f"out: {fault}"] if fault else []

    def misfits(self) -> Iterator[str]:
        """SAEs that cannot be trained like this."""
        lm = self.outline()
        if lm is None:
            return  # PyTorch's model is not loaded yet
        found = widths(self, lm)
        if not self.wanted():
            yield "no SAE is asked for: rules, sites, factors or seeds are none"
        try:
            devices = self.devices()
        except ValueError as error:
            yield str(error)
            return
        if not self.data.shards:
            yield from devices.share.faults(**{"data.readers": self.data.readers})
        for w in self.wanted():
            try:
                member = self.make(w, found)
                self.train.knob.prepare(member.sae)
                faults = [f"{w.rule}: {fault}" for fault in member.faults(found)]
                faults += devices.faults(member.sae, self.train, self.data.batch)
            except ValueError as error:
                faults = [f"{w.rule}: {line}" for line in str(error).split("\n")]
            yield from faults

    def devices(self) -> OneDevice:
        """Where to train; several processes spread rows where nothing else is said."""
        if self.runner == "pmap":
            if self.mesh:
                raise ValueError("runner=pmap has no mesh; leave out one of the two")
            return Pmap(self.at_once)
        sizes = mesh.parse(self.mesh)
        if hosts.several():
            sizes = sizes or {mesh.DATA: jax.device_count()}
        if sizes:
            return OnMesh(mesh.make(sizes), self.at_once)
        return OneDevice(self.at_once)

    def make(self, w: Wanted, widths: dict[str, int]) -> Member:
        """The member that one wish stands for."""
        target = None if w.target is None else widths[w.target]
        sae = self.sae.make(w.rule, widths[w.site], target, w.n_features)
        return Member(sae, w.site, w.target, w.seed, lr=w.lr)

    def members(self, widths: dict[str, int]) -> dict[str, Member]:
        """All of them by name: rule and knob, and what else tells them apart."""
        wanted = list(dict.fromkeys(self.wanted()))
        members: dict[str, Member] = {}
        for w in wanted:
            bound = rules.parse(w.rule)
            parts = [bound.rule.name, f"{bound.rule.knob}{bound.hp[bound.rule.knob]:g}"]
            parts += [w.site] * (len({v.site for v in wanted}) > 1)
            parts += [f"seed{w.seed}"] * (len({v.seed for v in wanted}) > 1)
            parts += [] if w.lr is None else [f"lr{w.lr:g}"]
            parts += [] if w.n_features is None else [f"F{w.n_features}"]
            name = "-".join(parts)
            if name in members:  # specs that differ in another argument
                name = f"{name}-{len(members)}"
            members[name] = self.make(w, widths)
        return members

    def open_stream(
        self, lm: Any, tokenizer: Any, share: Share = WHOLE
    ) -> FromShards | OnTheFly:
        """The batches, or this process's share of them."""
        return open_stream(self, lm, tokenizer, share)

    def estimates(self) -> dict[str, str]:
        """What a dry run says of size."""
        return estimates(self)


class Result(NamedTuple):
    """What a run gives: the SAEs, and what their last evaluation found."""

    trained: dict[str, TrainedSAE]
    evaluations: dict[str, Evaluation]
    evaluator: Evaluator
    tokenizer: Any


def run_training(config: Config, stop: Stop) -> Result:
    """Trains what the configuration asks for, and evaluates it."""
    tokenizer, lm = config.open_tokenizer(), config.open_lm()
    devices = config.devices()
    stream = config.open_stream(lm, tokenizer, devices.share)
    members = config.members(stream.widths)
    evaluator = config.evaluation.open(
        lm, tokenizer, config, config.data.contexts_per_pass
    )
    evaluations: dict[str, Evaluation] = {}
    made_by = {
        "text": config.text(),
        "packing": config.packing(repeat=True)._asdict(),
    }
    if isinstance(stream, FromShards):  # which were made with settings of their own
        made_by = {"shards": stream.shards.made_by}

    def evaluate(name: str, sae: SAE, variables: Variables) -> dict[str, float]:
        member = members[name]
        evaluations[name] = evaluator(
            sae, variables, member.site, target_site=member.target
        )
        return evaluations[name].scores

    trained = train_in_folder(
        config.out,
        config.identity(),
        members,
        stream,
        config.train,
        stop=stop,
        every=config.every,
        evaluate=evaluate,
        about={
            "lm": config.lm,
            "lm_weights": lm.fingerprint,
            "lm_dtype": config.lm_dtype,
            **made_by,
            "data": dataclasses.asdict(config.data),
        },
        wandb=config.wandb,
        profile=config.profile,
        devices=devices,
    )
    if not hosts.first():
        sys.exit()  # what follows is written once
    if config.profile:
        profile.show(Path(config.out).expanduser() / "profile")
    return Result(trained, evaluations, evaluator, tokenizer)
