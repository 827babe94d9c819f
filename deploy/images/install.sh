#!/bin/sh
# Installs into /opt/meshserve: with --torch URL, PyTorch as pinned, of the index at URL where it has
# a build of its own; with the name of an extra, the wheel in /wheels and what that extra names.
set -eu
pip() {
  /opt/installer/bin/pip --python /opt/meshserve/bin/python --disable-pip-version-check "$@"
}
case $1 in
  --torch)
    pip install --no-cache-dir --extra-index-url "$2" -c /requirements.lock \
      "$(grep '^torch==' /requirements.lock)"
    ;;
  *)
    pip install --no-cache-dir -c /requirements.lock "$(ls /wheels/meshserve-*.whl)[$1]"
    ;;
esac
