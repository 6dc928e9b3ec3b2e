#!/usr/bin/env bash
# Lints, checks the types and runs the tests, three at a time, because many wait for other processes; arguments go to
# pytest: bash scripts/test.sh -m "not slow" -k trie
DEV=1
source "$(dirname "$0")/setup.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 3 --dist worksteal "$@"
