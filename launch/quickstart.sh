#!/usr/bin/env bash
# From a clean clone to a report that compares every sharing on real data.
#
#   bash launch/quickstart.sh [--config.FIELD=VALUE ...]     flags are passed on to `qkvjax study`
#
# Makes .venv here, installs qkvjax (with CUDA where nvidia-smi finds a GPU), trains five variants
# x three seeds and prints where the report is. If it was interrupted, start it again: it resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

extras=
if gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) && [ -n "$gpus" ]; then
    extras=cuda
    echo "qkvjax quickstart on $(echo "$gpus" | head -n 1): installing first; how long it takes here was not measured"
else
    cores=$(getconf _NPROCESSORS_ONLN)
    echo "qkvjax quickstart on the CPU ($cores cores): about 5 minutes on 2 CPU cores, installation included"
fi
make_environment .venv "$extras"
exec "$python" -m qkvjax study --config=configs/quickstart.py --workdir=runs/quickstart "$@"
