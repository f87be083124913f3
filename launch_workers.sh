#!/usr/bin/env bash
# Start, show and stop the worker processes that notebooks use: torchrun in its own session.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch_workers.sh [start] [options]    start workers, and return when they are ready
launch_workers.sh status  [--name N]   show their state, and where their logs are
launch_workers.sh logs    [--name N]   show the end of their logs; --follow shows new lines too
launch_workers.sh stop    [--name N]   stop them

Options of start:
  --nproc N               ranks on this machine (default: 4)
  --device DEVICE         auto, cpu or cuda (default: auto, which is cuda where torch sees a GPU)
  --share-gpu             run all ranks on the first GPU (default: use all GPUs, and share them if needed)
  --algorithms FILE       verify the gather algorithms of a Python file, and offer them to notebooks
  --name NAME             name of this set of workers; several sets can run side by side (default: default)
  --nnodes N --node-rank I --rdzv-endpoint HOST:PORT
                          run one job on N machines: start it on each machine (default: 1 machine)
  --interface INTERFACE   serve notebooks over TCP on this interface (default: a private ipc socket)
  --max-restarts N        restart the ranks after a failure, at most N times (default: 0)
  --owner PID             stop when this process ends (default: run until stopped)
  --foreground            stay in this terminal, for srun or a container

PYTHON sets the interpreter; the default is .venv beside this script, otherwise python3.
`launch_workers.sh COMMAND --help` shows all options of a command.
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
    printf 'launch_workers.sh: unknown command %s; use start, status, logs or stop\n' "$1" >&2
    exit 2
    ;;
esac

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="$here/.venv/bin/python"
  [[ -x "$python" ]] || python=python3
fi

if ! "$python" -c 'import msgspec, psutil, zmq' 2>/dev/null; then
  printf 'cpkit is not installed for %s: run "make lab" once, or set PYTHON to an interpreter that has it\n' "$python" >&2
  exit 1
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m cpkit "$command" "$@"
