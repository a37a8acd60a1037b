"""The text of shell scripts for a TPU pod and for SLURM; not an experiment.

Values come in already quoted for a shell. What runs on the hosts is a script of its
own, quoted once more as a whole.
"""

import shlex
from collections.abc import Sequence

HEAD = """#!/usr/bin/env bash
# {what}
set -euo pipefail
"""

STATE = """
state() {{ # of the queued resource; NONE where there is none
  local errors
  errors=$(mktemp)
  if ! gcloud compute tpus queued-resources describe {name} {where} \\
    --format='value(state.state)' 2>"$errors"; then
    if grep -q NOT_FOUND "$errors"; then echo NONE; else cat "$errors" >&2; fi
  fi
  rm "$errors"
}}
"""

CREATE = """
gcloud compute tpus queued-resources create {name} --node-id={name} {where} \\
  --accelerator-type={accelerator_type} --runtime-version={runtime_version}{spot}
until [ "$(state)" = ACTIVE ]; do
  case "$(state)" in
    FAILED | SUSPENDING | SUSPENDED)
      echo "the request was not granted: $(state)" >&2
      exit 1
      ;;
  esac
  sleep 30
done
"""

ON_ALL = """
gcloud compute tpus tpu-vm ssh {name} {where} --worker=all --command={command}
"""

DELETE = """
gcloud compute tpus queued-resources delete {name} {where} --force --quiet
"""

# Python 3.11 is not on every TPU image, and make builds .venv with it.
SET_UP = """set -euo pipefail
sudo apt-get update -qq
sudo apt-get install -qq -y git make nfs-common {python} {python}-venv
if ! mountpoint -q {mount}; then
  sudo mkdir -p {mount}
  sudo mount -t nfs {share} {mount}
fi
[ -d sae_jax ] || git clone {repository} sae_jax
cd sae_jax
git fetch origin {revision}
git checkout --quiet --detach FETCH_HEAD
make install PYTHON={python}
.venv/bin/python -m pip install --quiet --constraint requirements.lock -e '.[tpu]'
"""

# A lost connection leaves the old process on the host, which holds the chips: it is
# asked to save, and the new one waits for its end. The lock goes with the process.
LAUNCH = """set -euo pipefail
mountpoint {mount}
cd sae_jax
exec 9>.launch.lock
if ! flock --nonblock 9; then
  kill -TERM "$(cat .launch.pid)"
  flock --timeout 600 9
fi
echo $$ >.launch.pid
exec .venv/bin/python launch.py --distributed {arguments}
"""

# Where the state is as before, it was not the slice that failed. A failed request and
# a lost connection count as failures as well.
WATCH = """
here=$(cd "$(dirname "$0")" && pwd)
failures=0
while :; do
  before=$(state)
  status=0
  case "$before" in
    ACTIVE)
      {{ "$here/set_up.sh" && "$here/launch.sh"; }} || status=$?
      if [ "$status" -eq 0 ]; then
        echo "ended well; delete.sh gives the slice back"
        exit 0
      fi
      ;;
    NONE) "$here/create.sh" || status=$? ;;
    FAILED | SUSPENDED) "$here/delete.sh" || status=$? ;; # preempted, or not granted
    *) sleep 30 ;; # on its way
  esac
  if [ "$status" -eq 0 ]; then continue; fi
  echo "status $status" >&2
  sleep 60 # a preemption shows in the state a little later
  if [ "$status" -eq {stopped} ] || [ "$(state)" != "$before" ]; then
    failures=0
    continue
  fi
  failures=$((failures + 1))
  if [ "$failures" -eq {failures} ]; then
    echo "{failures} failures in a row, and the slice is as before: $before" >&2
    exit "$status"
  fi
done
"""

# Slurm sends TERM to the tasks, not to this script. The first task to end with 75 may
# have the others ended by a signal, which srun reports as 143.
SLURM = """#!/usr/bin/env bash
# {what}
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}
#SBATCH --signal=TERM@{warning}
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd {checkout}
status=0
srun --kill-on-bad-exit=1 .venv/bin/python launch.py --distributed {arguments} ||
  status=$?
case "$status" in
  {stopped} | 143)
    scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$status"
"""


def local(what: str, body: str, **values: object) -> str:
    """A script that is run where `gcloud` is."""
    return (HEAD + body).format(what=what, **values)


def on_all(what: str, remote: str, values: dict[str, object]) -> str:
    """A script that has all hosts run another one."""
    command = shlex.quote(remote.format(**values))
    return local(what, ON_ALL, **values, command=command)


def words(arguments: Sequence[str]) -> str:
    """Arguments as a shell reads them back."""
    return " ".join(map(shlex.quote, arguments))
