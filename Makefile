# Each target sets up .venv by itself: CPU builds of torch and triton on a machine without an NVIDIA GPU.
PYTHON ?= python3
SETUP := PYTHON=$(PYTHON) sh scripts/setup.sh

.PHONY: demo test test-gpu bench lint wheel-test clean

demo:            ## rewrite, run and check a real video transformer
	$(SETUP) demo
	.venv/bin/python examples/demo.py

test:            ## the whole test suite, on two cores
	$(SETUP) dev
	.venv/bin/python -P -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

test-gpu:        ## what needs an NVIDIA GPU: its own tests, and the kernels' tests on it instead of in the interpreter
	$(SETUP) dev
	.venv/bin/python -P -m pytest -m gpu $(PYTEST_ARGS)
	.venv/bin/python -P -m pytest tests/kernels/test_select_triton.py tests/kernels/test_attend_triton.py \
		tests/kernels/test_attend_tiles.py tests/kernels/test_attend_backward.py $(PYTEST_ARGS)

bench:           ## one attention against cuDNN's at production sizes, forward alone and with its backward
	$(SETUP) dev
	.venv/bin/python -P benchmarks/attention.py --scaling
	.venv/bin/python -P benchmarks/training.py

lint:
	$(SETUP) dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

wheel-test:      ## types and a test run against the built wheel, as a user would have it
	$(SETUP) dev
	sh scripts/wheel_test.sh

clean:
	rm -rf .venv build dist *.egg-info
