#!/usr/bin/env bash
# One run in N processes on this machine: bash launch/local.sh N --config=... --workdir=...
#
# For a machine whose accelerators are given to a process each, and to see several hosts' behaviour
# on one. Process K of a machine with GPUs takes GPU K; on CPUs give each its devices, as in
#   XLA_FLAGS=--xla_force_host_platform_device_count=2 bash launch/local.sh 2 \
#       --config=configs/lm.py:depth=2 --config.mesh.fsdp=-1 --workdir=runs/two
#
# Ran: on CPUs, by tests/launch/test_local.py. Not run on hardware: with GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: how many processes? bash launch/local.sh N --config=... --workdir=..." >&2
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
set -m # each process in a group of its own: Ctrl-C comes once, from here
pids=()
for ((i = 0; i < count; i++)); do
    if [ -n "$extras" ]; then export JAX_LOCAL_DEVICE_IDS=$i; fi
    "$python" -m qkvjax train --coordinator="127.0.0.1:$port" --num_processes="$count" \
        --process_id="$i" "$@" &
    pids+=("$!")
done
# shellcheck disable=SC2317,SC2329  # by the traps
forward() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward USR1' USR1

# Once one is gone the others have a minute: a frozen process would never end by itself.
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
    while kill -0 "$pid" 2>/dev/null; do # a signal came while it was waited for, or it stands still
        sleep 0.2
        status=0
        wait "$pid" || status=$?
    done
    # Who was ended by a signal says less about the run than those who ended by themselves.
    if ((status > 130)); then killed=$status; elif ((status > code)); then code=$status; fi
done
kill -s KILL -- "-$reaper" 2>/dev/null || true
exit "$((code ? code : killed))"
