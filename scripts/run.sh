#!/usr/bin/env bash
# Installs, then trains the quickstart. Run it again to resume.
# Arguments are passed on: scripts/run.sh --config.train.steps=100
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
exec "${VENV:-.venv}/bin/python" -m sparsejax train --config=preset:quickstart --workdir=runs/quickstart "$@"
