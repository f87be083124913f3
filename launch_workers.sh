#!/usr/bin/env bash
# Starts, shows and ends the worker processes that notebooks talk to: torchrun in a session of its own.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch_workers.sh [start] [options]    start workers, and return when they are ready
launch_workers.sh status  [--name N]   what they are, and where their logs lie
launch_workers.sh logs    [--name N]   the end of their logs; --follow to go on
launch_workers.sh stop    [--name N]   end them

Options of start:
  --nproc 4               ranks on this machine
  --device auto           auto, cpu or cuda (auto: cuda where torch sees a GPU)
  --share-gpu             all ranks on the first GPU; automatic when ranks outnumber GPUs
  --name default          several sets of workers may run side by side
  --nnodes 2 --node-rank 0 --rdzv-endpoint HOST:PORT
                          one job over several machines: run this on each of them
  --interface eth0        serve notebooks over TCP on this interface (default: a private ipc socket)
  --max-restarts 0        start the ranks again when one died, so often
  --owner PID             end when this process ends (default: stay until stopped)
  --foreground            stay in this terminal, for srun or a container

PYTHON names the interpreter; the default is .venv beside this script, else python3.
`launch_workers.sh COMMAND --help` has more on each command.
TEXT
}

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

command=start
case "${1:-}" in
  start | status | logs | stop)
    command="$1"
    shift
    ;;
  -h | --help | help)
    usage
    exit 0
    ;;
  "" | -*) ;;
  *)
    printf 'launch_workers.sh: there is no command %s; use start, status, logs or stop\n' "$1" >&2
    exit 2
    ;;
esac

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="$here/.venv/bin/python"
  [[ -x "$python" ]] || python=python3
fi

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m cpkit "$command" "$@"
