#!/usr/bin/env bash
# Compare specauf with the reference implementation of DFlash (PyPI `dflash`), in an environment of its own.
#
#   bash tests/interop/run.sh [pytest arguments]
#
# SPECAUF_INTEROP_VENV    where the environment lives (default: .venv-interop in the repository's root)
# SPECAUF_INTEROP_TARGET  a Hugging Face model directory to use instead of the embedded default in the cache
# SPECAUF_INTEROP_DRAFTER a drafter checkpoint for that target to generate with, instead of one fitted on the spot
# PYTHON                  the interpreter the environment is made with (default: python3)
# PIP_TORCH               the torch to install (default: the one in constraints.txt)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
readonly REFERENCE="dflash==0.1.0"
venv="${SPECAUF_INTEROP_VENV:-.venv-interop}"
python="${PYTHON:-python3}"

fail() {
  echo "interop: the environment in $venv could not be built: $1" >&2
  echo "interop: nothing was compared. Mend the cause and run again; removing $venv starts afresh." >&2
  exit 1
}

# The reference declares exact pins of packages that only its benchmarks use: it is installed without its dependencies.
install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || fail "pip install $*"
}

inputs="$REFERENCE ${PIP_TORCH:-} $(cat pyproject.toml constraints.txt | cksum)"
if [[ "$(cat "$venv/.complete" 2>/dev/null)" != "$inputs" ]]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is not Python 3.11 or newer (set PYTHON)"
  echo "interop: building $venv (a minute or two)"
  "$python" -m venv "$venv" || fail "$python -m venv $venv (on Debian: apt-get install python3-venv)"
  rm -f "$venv/.complete"
  install -c constraints.txt "${PIP_TORCH:-torch}"
  install -c constraints.txt -e '.[gguf]' pytest
  install --no-deps "$REFERENCE"
  "$venv/bin/python" -c 'import specauf, dflash.model' || fail "dflash or specauf does not import"
  echo "$inputs" >"$venv/.complete"
fi

exec "$venv/bin/python" -m pytest -o addopts= -p no:cacheprovider --strict-markers -ra tests/interop "$@"
