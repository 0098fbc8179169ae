#!/usr/bin/env bash
# Installs, checks the style, then runs the tests, in as many processes as there are cores, four at most. Arguments go to
# pytest; `-n 0` runs everything in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
venv=${VENV:-.venv}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
exec "$venv/bin/python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
