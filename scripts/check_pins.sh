#!/usr/bin/env bash
# Resolves requirements.txt and requirements-dev.txt for every platform and Python that we support, against the package
# index alone: a pin that installs only on this machine (its wheels, its constraints) fails here. Run by `make pins`.
# Exits with 1 when the pins do not resolve. An index that cannot be reached is a warning.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
. scripts/env.sh

UV=0.13.9
cache=${FOVLM_CACHE:-$PWD/.cache}
venv=$cache/uv-venv-$UV
mkdir -p "$cache"

unreachable() {
  say "warning: the package index cannot be reached, the pins were not checked: $1"
  exit 0
}

if [ ! -x "$venv/bin/uv" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv" || exit 1
  error=$("$venv/bin/python" -m pip install -q --disable-pip-version-check "uv==$UV" 2>&1) ||
    { rm -rf "$venv"; unreachable "$(tail -n 1 <<<"$error")"; }
fi

unset "${!UV_@}" "${!PIP_@}"
export UV_CACHE_DIR=$cache/uv
status=0
for platform in x86_64 aarch64; do
  for version in 3.10 3.11 3.12 3.13; do
    # One interpreter builds what has no wheel (deepspeed), whatever version is resolved for.
    error=$("$venv/bin/uv" pip compile -q --no-config --python "$venv/bin/python" --python-version "$version" \
      --python-platform "$platform-manylinux_2_28" requirements.txt requirements-dev.txt 2>&1 >/dev/null)
    case $?:$error in
      0:*) echo "pins resolve: Linux $platform, Python $version" ;;
      2:*"Failed to fetch"*) unreachable "$(head -n 1 <<<"$error")" ;;
      *) say "the pins do not resolve for Linux $platform, Python $version:"$'\n'"$error"; status=1 ;;
    esac
  done
done
exit $status
