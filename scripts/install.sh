#!/usr/bin/env bash
# Installs sparsejax into .venv with the tested versions, unless that has been done.
# PYTHON sets the interpreter (python3 by default), VENV the folder (.venv).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
version=$("$python" -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparsejax needs Python 3.11 or newer" >&2; exit 2; }
constraints=scripts/constraints-$version.txt
stamp=$(cat pyproject.toml "$constraints" | sha256sum)
if [ "$(cat "$venv/installed" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e '.[dev]'
echo "$stamp" > "$venv/installed"
