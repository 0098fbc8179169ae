#!/usr/bin/env bash
# Installs, checks the style, then runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
venv=${VENV:-.venv}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
exec "$venv/bin/python" -m pytest "$@"
