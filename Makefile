# Each target sets up .venv by itself: CPU builds of torch and triton on a machine without an NVIDIA GPU.
PYTHON ?= python3
SETUP := PYTHON=$(PYTHON) sh scripts/setup.sh

.PHONY: demo test lint wheel-test clean

demo:            ## rewrite, run and check a real video transformer
	$(SETUP) demo
	.venv/bin/python examples/demo.py

test:            ## the whole test suite
	$(SETUP) dev
	.venv/bin/python -P -m pytest $(PYTEST_ARGS)

lint:
	$(SETUP) dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

wheel-test:      ## types and a test run against the built wheel, as a user would have it
	$(SETUP) dev
	sh scripts/wheel_test.sh

clean:
	rm -rf .venv build dist *.egg-info
