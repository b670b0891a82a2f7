# Each target does everything on a fresh machine: creates .venv, installs once, runs.
#   make demo     export the shipped model, compare it with Hugging Face, print the measured speed-up
#   make test     the test suite, in WORKERS processes
#   make check    ruff (lint and format) and mypy
#   make gpu-check   tests and measurements on a GPU, at most nine minutes; with RUN=python3 in an environment of your own
# PYTHON picks the interpreter (3.11 or newer). PIP_ARGS is passed to pip: on Linux, PyPI's torch brings CUDA with it, and
# PIP_ARGS="--extra-index-url <PyTorch's CPU index>" takes the far smaller CPU build of the same version.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
GPU_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow check gpu-check format clean

demo: $(VENV)/.installed-test
	$(RUN) examples/demo.py

test: $(VENV)/.installed-test
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(RUN) -m pytest -m slow $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

gpu-check: $(if $(filter $(VENV)/bin/python,$(RUN)),$(VENV)/.installed-test)
	$(RUN) benchmarks/gpu_check.py $(GPU_ARGS)

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'python -m venv failed; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }

# The stamp is written last, so an interrupted install is repeated. A changed version list is installed again, and changed
# C++ sources are built again.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inl) | $(VENV)/bin/python
	$(RUN) -m pip install $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	touch $@
