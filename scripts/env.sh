# shellcheck shell=bash
# Sourced by launch.sh and the Makefile, in the project's folder: the Python environment and the caches.
#
#   use_python [dev]   sets PYTHON; makes or updates .venv from the pinned requirements, and the command .venv/bin/fovlm
#   use_caches         keeps compiled helpers inside the project, or below FOVLM_CACHE
#
# FOVLM_PYTHON names the Python of an existing environment: then nothing is installed.

say() { printf 'fovlm: %s\n' "$*" >&2; }

use_python() {
  if [ -n "${FOVLM_PYTHON:-}" ]; then
    PYTHON=$(command -v "$FOVLM_PYTHON") || { say "FOVLM_PYTHON=$FOVLM_PYTHON is not a program"; return 2; }
  else
    mkdir -p .cache
    # Two starts at once install one after the other, where the system has a lock.
    ( ! command -v flock >/dev/null || flock 9; _make_venv "$@" ) 9>.cache/venv.lock 1>&2 || return 2
    PYTHON=$PWD/.venv/bin/python
  fi
  PATH=$(dirname "$PYTHON"):$PATH
  export PYTHON PATH
}

_make_venv() {
  if ! .venv/bin/python -c '' 2>/dev/null; then
    local base
    base=$(_find_python) || return 2
    say "making .venv with $base $("$base" -c 'import platform; print(platform.python_version())')"
    if ! "$base" -m venv --clear .venv; then
      rm -rf .venv
      say "$base cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"
      return 2
    fi
  fi
  _install requirements.txt && { [ "${1:-}" != dev ] || _install requirements-dev.txt; } && _make_command
}

# .venv/bin/fovlm works from any folder. No package is installed: transformers would find the folder `kernels` as a
# package and take it for Hugging Face's of that name.
_make_command() {
  [ -x .venv/bin/fovlm ] && return
  cat >.venv/bin/fovlm <<'SH' && chmod +x .venv/bin/fovlm
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")/../..
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$here/.venv/bin/python" -m fovlm "$@"
SH
}

# The pins are tested on python3.11; a name on the PATH may be a stub that does not run.
_find_python() {
  local candidate seen=""
  for candidate in python3.11 python3.12 python3.10 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    seen="$seen$("$candidate" -c 'import platform; print(", found", platform.python_version())' 2>/dev/null)"
  done
  say "requires Python 3.10 or newer (3.11 is best)${seen:-, found none}: install it, or set FOVLM_PYTHON"
  return 1
}

# Installs a file of pins once; a checksum in .venv tells when it changed.
_install() {
  local stamp=.venv/$1.installed sum
  sum=$(cksum <"$1")
  [ "$sum" = "$(cat "$stamp" 2>/dev/null)" ] && return
  say "installing $1 into .venv (once; some minutes)"
  if ! .venv/bin/python -m pip install --disable-pip-version-check -r "$1"; then
    say "installing $1 failed, see above; the same command tries again"
    return 2
  fi
  echo "$sum" >"$stamp"
}

use_caches() {
  local cache=${FOVLM_CACHE:-$PWD/.cache} compiled
  mkdir -p "$cache" || { say "cannot write FOVLM_CACHE=$cache"; return 2; }
  cache=$(cd "$cache" && pwd)
  # What one environment compiled must not be loaded by another.
  compiled=$cache/compiled-$( (echo "$PYTHON"; cat requirements.txt) | cksum | cut -d' ' -f1)
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$compiled/triton}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$compiled/torch_extensions}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$compiled/inductor}
  if [ -n "${FOVLM_CACHE:-}" ]; then
    export FOVLM_CACHE=$cache
    export HF_HOME=${HF_HOME:-$cache/huggingface} TORCH_HOME=${TORCH_HOME:-$cache/torch}
    export WANDB_CACHE_DIR=${WANDB_CACHE_DIR:-$cache/wandb} WANDB_DATA_DIR=${WANDB_DATA_DIR:-$cache/wandb}
    export WANDB_CONFIG_DIR=${WANDB_CONFIG_DIR:-$cache/wandb} MPLCONFIGDIR=${MPLCONFIGDIR:-$cache/matplotlib}
  fi
}
