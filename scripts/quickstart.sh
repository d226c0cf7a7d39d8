#!/usr/bin/env bash
# From a fresh clone to a table of compute-equivalent gains. Run it again at any time: what is done is not done twice,
# and what was interrupted goes on where it was. Arguments are Hydra overrides, such as fraction=0.1.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/python -m bench train -m study=quickstart "$@"
.venv/bin/python -m bench gains study=quickstart "$@"
