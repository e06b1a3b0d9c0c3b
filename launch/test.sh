#!/usr/bin/env bash
# The tests, in an environment of their own.
#
#   bash launch/test.sh             style and the default suite
#   bash launch/test.sh --all       the slow tests as well
#   bash launch/test.sh -k cache    further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

make_environment .venv-test test
select=(-m "not slow")
if [ "${1:-}" = --all ]; then
    select=()
    shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
# Two processes at a time: most tests keep one core busy. In the order of tests/conftest.py.
exec "$python" -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder "${select[@]}" "$@"
