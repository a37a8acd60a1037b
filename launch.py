"""Runs an experiment.

    python launch.py --experiment=NAME --setting=value ...

`--experiment=NAME --help` describes it and all its settings. With `--dry_run` the
settings are checked and shown, and nothing is run. Compiled programs are kept in the
user's cache directory, so that the next start is quicker.
"""

import importlib
import os
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from sae_jax import checks, settings
from sae_jax.run import hosts, job

ROOT = Path(__file__).parent
EXPERIMENTS = sorted(p.stem for p in (ROOT / "experiments").glob("[a-z]*.py"))
PROJECT = ("sae_jax", "experiments")

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sae_jax" / "xla"

CACHE_BYTES = 2**30  # what was used least recently goes first

OWN = flags.FlagValues()
flags.DEFINE_string("experiment", None, "which experiment to run", OWN)
flags.DEFINE_boolean("dry_run", False, "show what would be run, and stop", OWN)
flags.DEFINE_string(
    "compile_cache",
    str(CACHE),
    "folder for compiled programs (~/.cache/sae_jax/xla); empty: none",
    OWN,
)
flags.DEFINE_boolean(
    "distributed",
    False,
    "one of several processes: on a TPU pod, under SLURM, or as said by",
    OWN,
)
flags.DEFINE_string("coordinator", "", "HOST:PORT of the first process", OWN)
flags.DEFINE_integer("processes", 0, "how many there are", flag_values=OWN)
flags.DEFINE_integer("process", -1, "which one this is, from 0 on", flag_values=OWN)
flags.DEFINE_integer(
    "local_processes",
    0,
    "start so many on this machine, and watch over them",
    flag_values=OWN,
)
flags.DEFINE_boolean("help", False, "this text", OWN)


def main(work: Callable[[], object]) -> None:
    """Does what was asked for."""
    try:
        work()
    except Exception as error:
        # What the project itself says of bad input is complete; the rest is a fault
        # of ours, and its traceback is needed.
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = any(last.is_relative_to(ROOT / own) for own in PROJECT)
        if not ours or not isinstance(error, ValueError | OSError):
            if not hosts.several():
                raise
            leave(traceback.format_exc(), 1)
        leave(f"error: {error}", 1)


def read(argv: list[str]) -> Callable[[], object]:
    """What is asked for. A manual, or the list of all faults, ends the program here.

    absl finds the flags and settings reads their values. What is left after the
    settings goes to the flags of absl and of other libraries, such as --verbosity.
    """
    faults: list[str] = []
    rest = take(OWN, joined(argv[1:]), faults)
    name = OWN.experiment
    if name is None:
        leave(overview(), 0 if OWN["help"].value else 2)
    if name not in EXPERIMENTS:
        leave(f"--experiment: {checks.unknown('experiment', name, EXPERIMENTS)}", 2)
    if OWN.local_processes:
        take(flags.FLAGS, [], faults)  # which absl insists on
        return lambda: sys.exit(job.run(alone(argv), OWN.local_processes))
    if OWN.distributed:
        join()
    experiment = importlib.import_module(f"experiments.{name}")
    default = experiment.Config()
    if OWN["help"].value:
        leave(f"{experiment.__doc__}{manual(default)}")
    theirs, text = flags.FlagValues(), flags.ArgumentParser()
    for s in settings.declared(default):
        flags.DEFINE(text, s.flag, None, s.text, theirs, boolean=s.kind is bool)
    rest = take(flags.FLAGS, take(theirs, rest, faults), faults)
    given = {flag: theirs[flag].value for flag in theirs if theirs[flag].present}
    given |= {a.lstrip("-").split("=")[0]: "" for a in rest if a[:1] == "-"}
    faults += [f"{a}: settings are given as --name=value" for a in rest if a[:1] != "-"]
    config, more = settings.build(default, given, also=list(OWN))
    if hosts.several() and not hasattr(config, "mesh"):
        faults.append(f"--distributed: {name} is not for several processes")
    if faults + more:
        leave("\n".join(faults + more), 2)
    if OWN.dry_run:
        return lambda: print(shown(name, config))

    def work() -> None:
        keep_programs(OWN.compile_cache)
        experiment.run(config)

    return work


def join() -> None:
    """Makes this one of several processes, of which the first speaks for all."""
    place = OWN.coordinator, OWN.processes, OWN.process
    try:
        hosts.join(*place)
    except ValueError as error:
        leave(f"--distributed: {error}", 2)
    if not hosts.first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def alone(argv: list[str]) -> list[str]:
    """The command of one of the processes that `--local_processes` asks for."""
    rest = [a for a in joined(argv[1:]) if not a.startswith("--local_processes")]
    return [sys.executable, str(Path(__file__).resolve()), *rest]


def keep_programs(folder: str) -> None:
    """Has JAX keep what it compiles there, and look there first; `""`: it does not.

    Also what compiles in a moment is kept: a start compiles about a hundred programs,
    and few of them take long. The name of an entry is a hash of the program, the
    versions, XLA's flags and the device, with the features of a CPU. So machines may
    share the folder, and it may be removed at any time. JAX warns of an entry that a
    kill has cut short, and compiles anew.
    """
    if not folder:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        print(f"nothing compiled is kept for the next start: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # With a size JAX locks the folder, so that two starts may share it.
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def joined(arguments: list[str]) -> list[str]:
    """`--name value` as `--name=value`, so that every argument stands for itself."""
    found: list[str] = []
    for argument in arguments:
        last = found[-1] if found else ""
        if last.startswith("-") and "=" not in last and argument[:2] != "--":
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def take(known: flags.FlagValues, arguments: list[str], faults: list[str]) -> list[str]:
    """Gives these flags their values, one by one; what is left of the arguments."""
    rest = known(["launch.py"])[1:]
    for argument in arguments:
        try:
            rest += known(["launch.py", argument], known_only=True)[1:]
        except (flags.Error, ValueError) as error:
            faults.append(f"{argument}: {error}")
    return rest


def leave(text: str, status: int = 0) -> NoReturn:
    """Ends the program with a text, on stderr if it is of faults."""
    print(text, file=sys.stderr if status else sys.stdout)
    if status and hosts.several():
        hosts.leave(status)
    sys.exit(status)


def overview() -> str:
    """What can be run, with the first line that each experiment says of itself."""
    lines = [__doc__ or "", "--experiment is one of", ""]
    for name in EXPERIMENTS:
        text = (ROOT / "experiments" / f"{name}.py").read_text()
        lines += [f"  {name}", f"      {text[3:].splitlines()[0]}"]
    return "\n".join(lines)


def manual(default: Any) -> str:
    """All settings with type, default and description, section by section."""
    lines, section = [], None
    for flag, path, kind, value, text, heading in settings.declared(default):
        if path[:-1] != section:
            section = path[:-1]
            lines += ["", heading, ""]
        no = "[no]" if kind is bool and not section else ""
        needed, value = settings.needed(kind), settings.show(value)
        lines += wrapped(f"  --{no}{flag}: {needed} (default: {value})", 8)
        lines += wrapped(" " * 6 + text, 6)
    lines += ["", "Flags of launch.py itself.", ""]
    return "\n".join(lines + [f"  --{name}: {OWN[name].help}" for name in OWN])


def wrapped(text: str, later: int) -> list[str]:
    """Lines of at most 88 columns, the later ones indented; no word is broken."""
    form = textwrap.TextWrapper(88, subsequent_indent=" " * later)
    form.break_long_words = form.break_on_hyphens = False
    return form.wrap(text)


def shown(name: str, config: Any) -> str:
    """The settings as they can be given again, and what the experiment estimates."""
    rows = {"--experiment": name}
    rows |= {f"--{s.flag}": settings.show(s.value) for s in settings.declared(config)}
    width = max(map(len, rows))
    lines = [f"{flag:{width}} = {value}" for flag, value in rows.items()]
    if hasattr(config, "estimates"):
        try:
            estimates = config.estimates()
        except OSError as error:  # such as a model that is out of reach
            estimates = {"no estimates": str(error)}
        lines += ["", *(f"{what}: {text}" for what, text in estimates.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # of the libraries; --verbosity changes it
    app.run(main, argv=sys.argv, flags_parser=read)
