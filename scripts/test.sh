#!/usr/bin/env bash
# Installs, checks style and types, then runs the tests in one process per core, at most four.
#
#     scripts/test.sh                        the default tier
#     scripts/test.sh --quick                the tests marked quick, without the check of types: two minutes
#     scripts/test.sh --refresh-messages     rewrites tests/golden/messages.txt
#     scripts/test.sh -m nightly --timeout=0 another tier; all other arguments go to pytest (-n 0: one process)
#
# A test that takes more than 20 minutes fails, and a worker that crashes ends the run: neither leaves it waiting.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
bin=${VENV:-.venv}/bin
"$bin/ruff" check --quiet .
"$bin/ruff" format --check --quiet .
if [ "${1-}" = --quick ]; then
  set -- -m quick "${@:2}"
else
  "$bin/mypy"
fi
exec "$bin/python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --max-worker-restart=0 \
  --timeout=1200 --durations=100 --durations-min=10 "$@"
