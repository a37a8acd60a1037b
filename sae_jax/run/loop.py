"""The loop: feed, step, note, evaluate, save; for one SAE or many on the same batches.

Members that are alike are trained side by side, in groups. One that diverges stays as
it was before, is reported once, and the others go on; when all have, training ends.

After step t come its duties, in this order: metrics, evaluation, checkpoint. A run that
goes on from a checkpoint of step t does the duties of step t once more, and its log
drops what it had of them; so it does not matter when it was stopped. Metrics stay on
the device until the next window of steps is on its way.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, NamedTuple

from tqdm import tqdm

from sae_jax import checks
from sae_jax.model import SAE
from sae_jax.run import diverged, hosts
from sae_jax.run.checkpoints import Checkpoints
from sae_jax.run.devices import ONE_DEVICE, OneDevice
from sae_jax.run.groups import Held, grouped
from sae_jax.run.log import Log, Timing, plain
from sae_jax.run.members import Member, Rows, Stream
from sae_jax.run.profile import Profile
from sae_jax.run.progress import Progress
from sae_jax.run.stop import Stop, end_together, nothing_to_save
from sae_jax.trained import TrainedSAE
from sae_jax.training.recipe import Recipe
from sae_jax.training.window import Window
from sae_jax.variables import Variables


@dataclasses.dataclass(frozen=True)
class Every:
    """How often things are done."""

    log: Annotated[int, "steps over which metrics are averaged"] = 50
    evaluate: Annotated[int, "steps between evaluations; 0: only at the end"] = 0
    save: Annotated[int, "steps between checkpoints"] = 1000
    keep: Annotated[int, "how many of the newest checkpoints stay"] = 2

    def __post_init__(self) -> None:
        faults = checks.field_faults("", self)
        faults += [
            f"{name}=0 must be at least 1."
            for name in ("log", "save", "keep")
            if getattr(self, name) == 0
        ]
        checks.raise_all(faults)


class Point(NamedTuple):
    """Where training stands: after `step` steps."""

    step: int
    held: list[Held]
    position: Any


Evaluate = Callable[[str, SAE, Variables], Mapping[str, Any]]
EVERY = Every()


class Loop:
    """Trains members; `run` does it.

    Args:
      members: the SAEs, by name.
      stream: where batches come from.
      recipe: how they are trained.
      every: how often to log, evaluate and save.
      logs: given the step at which the run begins, opens what metrics go to.
      checkpoints: where to save, if at all.
      evaluate: called with the name, description and arrays of a member.
      timing: notes when windows of steps end.
      stop: what saves when the process is told to end.
      profile: traces some steps.
      devices: where to train; see `sae_jax.run.devices`.
      progress: whether to show a bar.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        stream: Stream,
        recipe: Recipe,
        *,
        every: Every = EVERY,
        logs: Callable[[int], Sequence[Log]] = lambda start: (),
        checkpoints: Checkpoints | None = None,
        evaluate: Evaluate | None = None,
        timing: Timing | None = None,
        stop: Stop | None = None,
        profile: Profile | None = None,
        devices: OneDevice = ONE_DEVICE,
        progress: bool = True,
    ):
        faults = [
            f"{name}: {fault}"
            for name, member in members.items()
            for fault in member.faults(stream.widths)
        ]
        faults += recipe.faults(stream.batch)
        for member in members.values():
            faults += devices.faults(member.sae, recipe, stream.batch)
        checks.raise_all(faults)
        self.members, self.stream, self.recipe = dict(members), stream, recipe
        self.every, self.checkpoints, self.evaluate = every, checkpoints, evaluate
        self.history: dict[str, list[dict[str, Any]]] = {name: [] for name in members}
        self._open_logs, self._show, self._stop = logs, progress, stop or Stop()
        self._timing, self._profile, self._devices = timing, profile, devices
        self._groups = grouped(self.members, recipe, devices)
        self._unread: tuple[int, list[Window]] | None = None

    def run(self) -> dict[str, TrainedSAE]:
        """Trains to the end, from the newest checkpoint if there is one."""
        found = None
        if self.checkpoints:
            shapes = self._groups.shapes(self.stream, self._devices)
            like = {"held": self._groups.named(shapes)}
            found = self.checkpoints.restore(like, tqdm.write)
        start = found.step if found else 0
        position = found.notes["position"] if found else None
        batches: Iterator[Rows] = iter(())
        if start < self.recipe.steps:
            batches = self.stream.batches(start, position)
        first = next(batches, None)
        if found:
            held = self._groups.listed(found.state["held"])
            self._point = Point(start, held, position)
        elif first is None:
            raise ValueError("there are no activations to train on")
        else:
            with self._devices.entered():
                held = self._groups.fresh(self._devices.sample(first))
            self._point = Point(0, held, self.stream.position(0))
        total, done = (n * self.stream.batch for n in (self.recipe.steps, start))
        show = self._show and hosts.first()
        with ExitStack() as opened:
            self._bar = opened.enter_context(Progress(total, done, show=show))
            self._logs = self._open_logs(start)
            opened.callback(self._end)
            self._stop.save = self._save_now
            self._train(first, batches)
            if self.checkpoints:
                self.checkpoints.wait()
        return {name: self._trained(name) for name in self.members}

    def _end(self) -> None:
        """Closes the logs; a stop from here on has nothing to save."""
        if self._profile:
            self._profile.end(self._point.held)
        with self._stop.lock:
            self._stop.save = nothing_to_save
            for log in self._logs:
                log.close()

    def _train(self, rows: Rows | None, batches: Iterator[Rows]) -> None:
        """Steps and duties, until all steps are done or the activations end."""
        steps = []
        if rows is not None:
            with self._devices.entered():
                steps = self._groups.compile(self._point.held, rows, self._devices)
        if self._profile:
            self._profile.explain(steps)
        while True:
            t = self._point.step
            if self._profile:
                self._profile.between_steps(self._point.held, last=rows is None)
            logged = self._duties(t, last=rows is None)
            if rows is None:
                return
            if hosts.told_to_end(t):
                end_together(self._save_now())
            with self._stop.lock:  # while a step runs, its state is nowhere whole
                placed = self._devices.rows(rows)
                held = self._groups.step(steps, self._point.held, placed, logged)
                self._point = Point(t + 1, held, self.stream.position(t + 1))
            self._bar.step(self.stream.batch)
            rows = next(batches, None) if t + 1 < self.recipe.steps else None

    def _duties(self, t: int, last: bool) -> bool:
        """What is due after t steps; whether that began a new window."""
        logs = t > 0 and (last or t % self.every.log == 0)
        every = self.every.evaluate
        evaluates = t > 0 and (last or (every > 0 and t % every == 0))
        saves = t > 0 and (last or t % self.every.save == 0)
        if logs:
            self._read_window()
            if self._timing:
                self._timing.note(t, t * self.stream.batch)
            self._unread = t, [held.window for held in self._point.held]
        if evaluates:
            self._evaluate(t)
        if saves:
            with self._stop.lock:
                self._save()
        return logs

    def _read_window(self) -> None:
        """Notes the metrics of the last finished window, once they are wanted."""
        with self._stop.lock:
            if self._unread is None:
                return
            t, windows = self._unread
            means = {}
            for name, (window, said) in self._read(windows, t).items():
                bad = window.diverged
                if bad < 0:
                    means[name] = window.means()
                    self._note(t, name, "train", means[name])
                elif bad >= t - window.count:  # and not before this window
                    self._note(t, name, "diverged", {"in_step": bad})
                    if hosts.first():
                        tqdm.write(f"{said} It stays as it was before.", sys.stderr)
            self._unread = None
            self._bar.show(means)

    def _read(self, windows: Any, t: int) -> dict[str, tuple[Window, str]]:
        """The windows of all members, on the host, and what is said of divergence.

        When all have diverged, training ends.
        """
        windows = self._devices.read(windows)
        found = {}
        for name in self.members:
            window = self._groups.of(windows, name)
            found[name] = window, diverged.said(name, window, t)
        if min(window.diverged for window, _ in found.values()) < 0:
            return found
        _, said = min(found.values(), key=lambda one: one[0].diverged)
        steps = self.checkpoints.steps() if self.checkpoints else []
        good = "There is no checkpoint."
        if self.checkpoints and steps:
            good = f"The last good checkpoint is {self.checkpoints.path(steps[-1])}."
        raise diverged.NotFinite(f"{said} {good} {diverged.ADVICE}")

    def _note(self, t: int, name: str, kind: str, values: Mapping[str, Any]) -> None:
        line = {"step": t, "sae": name, "kind": kind, "rows": t * self.stream.batch}
        line |= {metric: plain(value) for metric, value in values.items()}
        self.history[name].append(line)
        for log in self._logs:
            log.write(line)

    def _evaluate(self, t: int) -> None:
        self._read_window()
        if self.evaluate is None:
            return
        for name in self.members:
            now = self._trained(name)
            scores = self.evaluate(name, now.sae, now.variables)
            with self._stop.lock:
                self._note(t, name, "eval", scores)

    def _save(self) -> None:
        """Begins a checkpoint of this point; all before it is on disk first."""
        if self.checkpoints is None:
            return
        self._read_window()
        self._read([held.window for held in self._point.held], self._point.step)
        for log in self._logs:
            log.flush()
        notes = {"position": hosts.whole_position(self._point.position)}
        state = {"held": self._groups.named(self._point.held)}
        self.checkpoints.save(self._point.step, state, notes)

    def _save_now(self) -> str:
        """What happens when the process is told to end."""
        if self.checkpoints is None:
            return "Nothing is saved, since the run has no folder."
        if self._point.step:
            self._save()
        self.checkpoints.wait()
        return (
            f"{self._point.step} steps are safe in {self.checkpoints.folder}. "
            f"The same command goes on."
        )

    def _trained(self, name: str) -> TrainedSAE:
        member = self.members[name]
        state = self._groups.of([held.state for held in self._point.held], name)
        wanted = state.variables, state.step, state.control, state.diverged
        variables, step, control, stopped = self._devices.together(wanted)
        diverged_in = int(stopped)
        about = {
            "site": member.site,
            "target": member.target,
            "seed": member.seed,
            "steps": self._point.step,
            "rows": self._point.step * self.stream.batch,
            "recipe": dataclasses.asdict(self.recipe),
            **({"lr": member.lr} if member.lr is not None else {}),
            **({"diverged_in_step": diverged_in} if diverged_in >= 0 else {}),
        }
        sae = self.recipe.knob.reached(member.sae, step, control)
        return TrainedSAE(sae, variables, about, self.history[name])
