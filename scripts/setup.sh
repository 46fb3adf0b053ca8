#!/bin/sh
# Set up .venv for "demo" (what the demo needs) or "dev" (what the tests need), from the pins in constraints/.
set -eu
extras=diffusers
[ "${1:-demo}" = dev ] && extras=diffusers,onnx,tensorrt-rtx,dev
if nvidia-smi -L >/dev/null 2>&1; then machine=gpu; else machine=cpu; fi
stamp=.venv/.installed-$machine-$extras
wanted=$(cat setup.cfg pyproject.toml constraints/$machine.txt scripts/setup.sh | cksum)
[ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && exit 0

"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "this needs Python 3.11 or newer to set up .venv; name one with: make PYTHON=python3.12 ..." >&2
  exit 1
}
[ -x .venv/bin/pip ] || "${PYTHON:-python3}" -m venv .venv
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check -c "constraints/$machine.txt" "$@"; }
echo "setting up .venv ($machine, $extras)"
if [ "$machine" = cpu ]; then
  # A CPU build found where pip looks by default is taken; otherwise PyTorch's own index has it.
  install torch triton 2>/dev/null || {
    install --index-url https://download.pytorch.org/whl/cpu torch
    install triton
  }
fi
install -e ".[$extras]"
echo "$wanted" >"$stamp"
