# Everything a developer runs. `make` alone lists it.
PYTHON ?= python3
STACK ?= default
TORCH ?=
ARGS ?=

VENV_default := .venv
VENV_openmmlab := .venv-openmmlab
VENV := $(VENV_$(STACK))
ifeq ($(VENV),)
$(error STACK=$(STACK) is unknown: default or openmmlab)
endif
RUN := $(VENV)/bin/python
# Each test computes in one thread. ARGS="-n 0" runs all in one process, as a debugger needs it.
PYTEST := $(RUN) -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal --durations=15

export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help env demo demo-det test test-fast lint clean

help: ## print this list
	@echo 'make TARGET [PYTHON=python3.12] [STACK=openmmlab] [TORCH=2.8.0] [ARGS="more arguments"]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## set up .venv (STACK=openmmlab: .venv-openmmlab); minutes the first time, then a second
	@$(PYTHON) tools/make_env.py --stack $(STACK) $(if $(TORCH),--torch $(TORCH))

demo: env ## train, evaluate and deploy a small segmentor on data that comes along
	$(RUN) tools/demo.py $(ARGS)

demo-det: env ## the same with instance segmentation
	$(RUN) tools/demo.py --config configs/demo_mask-rcnn_unireplknet_a_digit-scenes.py $(ARGS)

test: env ## run every test; those marked cuda only where torch sees a GPU
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then marks=''; else marks='not cuda'; fi; \
	set -x; $(PYTEST) -m "$$marks" $(ARGS)

test-fast: env ## run the tests that take no longer than a few seconds, without a GPU
	$(PYTEST) -m "not slow and not cuda" $(ARGS)

lint: env ## check style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean: ## remove what builds and test runs leave behind; keeps the environments
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis mmunireplknet/ops/*.so mmunireplknet/ops/*.partial
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
