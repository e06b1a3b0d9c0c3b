#!/usr/bin/env bash
# Starts one run on all hosts of a TPU slice.
#
#   bash launch/tpu_vm.sh [--dry_run] NAME ZONE --config=... --workdir=...
#
#   bash launch/tpu_vm.sh my-v5e-16 us-west4-a --config=configs/lm.py:size=124m \
#       --config.mesh.fsdp=-1 --workdir=/mnt/runs/first
#
# Copies this checkout to each host, installs qkvjax[tpu] there and starts `train`. The processes
# find each other by themselves. The workdir must be a folder that all hosts see: Filestore, or a
# bucket mounted with gcsfuse. --dry_run prints the commands without running them.
#
# Ran: --dry_run, by tests/launch/test_files.py. Not run on hardware.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=()
if [ "${1:-}" = --dry_run ]; then
    run=(echo)
    shift
fi
if [ $# -lt 3 ] || [[ $1 == -* || $2 == -* ]]; then
    echo "error: bash launch/tpu_vm.sh [--dry_run] NAME ZONE --config=... --workdir=..." >&2
    exit 2
fi
name=$1 zone=$2
shift 2
flags=$(printf ' %q' "$@")
archive=$(mktemp -t qkvjax-XXXXXX.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD

"${run[@]}" gcloud compute tpus tpu-vm scp "$archive" "$name:qkvjax.tar.gz" \
    --zone="$zone" --worker=all
"${run[@]}" gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
set -e; mkdir -p qkvjax; tar -xzf qkvjax.tar.gz -C qkvjax; cd qkvjax
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet '.[tpu]'
.venv/bin/python -m qkvjax train$flags"
