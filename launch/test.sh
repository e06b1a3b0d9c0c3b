#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own, .venv-test.
#
#   bash launch/test.sh             style checks and the tests that are not slow
#   bash launch/test.sh --all       the slow tests too
#   bash launch/test.sh -k cache    other arguments are passed on to pytest
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
# Two processes, because most tests keep one core busy; --no-loadscope-reorder keeps the order of
# tests/conftest.py.
exec "$python" -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder "${select[@]}" "$@"
