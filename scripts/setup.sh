#!/usr/bin/env bash
# Makes .venv and installs requirements.txt into it; does nothing when that is done already, or when PYTHON names an
# interpreter that has the packages. Sourced by the other scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OWN="${PYTHON:-}"
PYTHON="${OWN:-.venv/bin/python}"
if [ -z "$OWN" ] && ! cmp -s requirements.txt .venv/installed.txt; then
    [ -x "$PYTHON" ] || "${BASE_PYTHON:-python3}" -m venv .venv
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
