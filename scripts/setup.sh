#!/usr/bin/env bash
# Makes .venv with what the project needs; quick when it is there already. Arguments: extras, such as dev.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:+[$1]}
stamp=.venv/installed-${1:-run}
wanted=$(cat pyproject.toml constraints-cpu.txt | sha256sum)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "error: cegbench needs Python 3.11 or newer; name one as in PYTHON=python3.12 $0" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
# With a GPU pip takes the newest torch. Without one, a version is named so that a CPU build of it can be taken.
constraint=()
command -v nvidia-smi >/dev/null || constraint=(-c constraints-cpu.txt)
echo "installing into .venv (once)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${constraint[@]}" -e ".$extras"
printf '%s\n' "$wanted" >"$stamp"
