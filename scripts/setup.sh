#!/usr/bin/env bash
# Makes .venv and installs requirements.txt into it, with DEV=1 requirements-dev.txt too; does nothing when that is done
# already, or when PYTHON names an interpreter that has the packages. Sourced by the other scripts, whose --help it prints:
# the comments at their heads.
set -euo pipefail
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    first=$((${#BASH_SOURCE[@]} > 1)) # sourced, it says nothing of itself
    for ((i = ${#BASH_SOURCE[@]} - 1; i >= first; i--)); do sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "${BASH_SOURCE[i]}"; done
    exit 0
fi
CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    # Missing, or made in part and never installed into.
    if [ ! -x "$PYTHON" ] || { [ ! -f .venv/requirements.txt ] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; }; then
        BASE_PYTHON="${BASE_PYTHON:-python3}"
        "$BASE_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "setup.sh: error: $BASE_PYTHON is missing, or older than Python 3.11; name another one: BASE_PYTHON=python3.12" >&2
            exit 2
        }
        "$BASE_PYTHON" -m venv .venv
    fi
    for file in requirements.txt ${DEV:+requirements-dev.txt}; do
        if ! cmp -s "$file" ".venv/$file"; then
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$file"
            cp "$file" ".venv/$file"
        fi
    done
fi
