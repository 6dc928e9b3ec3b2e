#!/usr/bin/env bash
# Lints and runs the tests; arguments go to pytest: bash scripts/test.sh -k trie
source "$(dirname "$0")/setup.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 "$@"
