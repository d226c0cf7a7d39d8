#!/usr/bin/env bash
# The tests, on two processes. Arguments go on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
exec .venv/bin/python -m pytest -n 2 "$@"
