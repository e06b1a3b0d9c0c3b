#!/usr/bin/env bash
# Starts one run in N processes on this machine.
#
#   bash launch/local.sh N --config=... --workdir=...
#
# Use it to give each GPU of a machine a process of its own, or to try on one machine how several
# hosts behave. With GPUs, process K uses GPU K. On CPUs, set the number of devices of each process:
#
#   XLA_FLAGS=--xla_force_host_platform_device_count=2 bash launch/local.sh 2 \
#       --config=configs/lm.py:depth=2 --config.mesh.fsdp=-1 --workdir=runs/two
#
# Ran: on CPUs, by tests/launch/test_local.py. Not run with GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the first argument must be the number of processes: bash launch/local.sh N --config=... --workdir=..." >&2
    exit 2
fi
count=$1
shift
extras=
if gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null) && [ -n "$gpus" ]; then
    extras=cuda
fi
make_environment .venv "$extras"

port=$((10000 + RANDOM % 20000))
set -m # each process gets its own process group, so that only this script passes Ctrl-C on
pids=()
for ((i = 0; i < count; i++)); do
    if [ -n "$extras" ]; then export JAX_LOCAL_DEVICE_IDS=$i; fi
    "$python" -m qkvjax train --coordinator="127.0.0.1:$port" --num_processes="$count" \
        --process_id="$i" "$@" &
    pids+=("$!")
done
# shellcheck disable=SC2317,SC2329  # the traps call it
forward() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward USR1' USR1

# When one process has ended, the others have a minute to end: a frozen one would never do so.
all_alive() { for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null || return 1; done; }
(
    while all_alive; do sleep 1; done
    sleep 60
    kill -s KILL "${pids[@]}" 2>/dev/null || true
) &
reaper=$!

code=0 killed=0
for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    # wait also returns when a signal reaches this script, or when the process is stopped: again then.
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        status=0
        wait "$pid" || status=$?
    done
    # The exit code of a process that ended by itself says more about the run than that of one that
    # a signal ended, so the largest of the former is the code of this script.
    if ((status > 130)); then killed=$status; elif ((status > code)); then code=$status; fi
done
kill -s KILL -- "-$reaper" 2>/dev/null || true
exit "$((code ? code : killed))"
