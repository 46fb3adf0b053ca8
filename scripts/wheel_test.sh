#!/bin/sh
# Build the wheel, install it in place of the editable package, check its types and test it away from the sources.
set -eu
root=$(pwd)
rm -rf build dist
.venv/bin/python -m build --quiet --wheel --no-isolation
.venv/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
work=$(mktemp -d)
restore() { cd "$root"; rm -rf "$work"; "$root/.venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e "$root"; }
trap restore EXIT
cp -r tests setup.cfg examples benchmarks "$work"
cd "$work"
"$root/.venv/bin/python" -P - <<PY
import vmoba_compile, vmoba_compile.kernels, vmoba_compile.passes
assert "site-packages" in vmoba_compile.kernels.__file__, vmoba_compile.kernels.__file__
PY
"$root/.venv/bin/mypy" --config-file setup.cfg -p vmoba_compile
"$root/.venv/bin/python" -P -m pytest -q -n 2 --dist loadgroup -m "not slow" ${PYTEST_ARGS:-tests/kernels/test_golden.py tests/vmoba_compile/test_cli.py}
