# Everything runs in a virtual environment of its own; only installing needs a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# a wheel of torch that pip finds on this disk by itself may not match torchvision: take the pinned pair instead
PIP := PIP_FIND_LINKS= $(BIN)/python -m pip

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-faults check clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(READY)  ## make .venv with the package, its tests and its checks (about 3 minutes, 6 GB)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## the whole story on bundled digits, offline: train, fit, explain, draw (under 3 minutes)
	$(BIN)/epic-ray demo

test: install  ## all tests (under 30 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n auto --dist loadscope -m "not ray"
	$(BIN)/python -m pytest -q --durations=40 -m ray

test-quick: install  ## the tests that start no Ray and take no time (under 2 minutes)
	$(BIN)/python -m pytest -q -n auto --dist loadscope -m "not slow and not ray"

test-faults: install  ## every fault at every moment, and clusters; a table goes to runs/faults.md (about 50 minutes on 2 cores)
	@mkdir -p runs
	$(BIN)/python -m pytest -q --faults --fault-table=runs/faults.md tests/faults tests/stages/test_fit_faults.py tests/submission/test_cluster.py \
		tests/submission/test_hosts.py tests/e2e

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the virtual environment, caches and demo runs
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
