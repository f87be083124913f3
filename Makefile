# Every developer command is a target here; `make` without a target lists them.
# A target first creates .venv and installs what it needs, if that is missing.

PYTHON ?= python3
NPROC ?=
NAME ?= default
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help lab test test-all test-gpu lint format bench bench-gpu notebooks rehearse lock hooks clean distclean

help: ## list the targets
	@echo 'make TARGET [NPROC=4] [NAME=default] [PYTHON=python3] [ARGS=...]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

lab: $(VENV)/.has-notebooks ## start NPROC workers and open JupyterLab on the first notebook
	$(PY) -m cpkit lab --name $(NAME) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

test: $(VENV)/.has-test ## run the tests, cheapest first, except those marked slow (ARGS goes to pytest)
	$(PY) -m pytest $(ARGS)

test-all: test ## make test, then the tests marked slow
	$(PY) -m pytest --slow $(ARGS)

lint: $(VENV)/.has-dev ## run ruff, mypy --strict (on cpkit, lessons, tools and examples) and shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck launch_workers.sh .ci/run

format: $(VENV)/.has-dev ## let ruff fix and format what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test-gpu: $(VENV)/.has-test ## run the tests that need a GPU, with 2, 4 and 8 ranks (ARGS goes to pytest)
	$(PY) -m pytest -m gpu $(ARGS)

bench: $(VENV)/.has-bench ## measure against gloo and Open MPI; update the figures in README and docs
	$(PY) -m benchmarks.run $(ARGS)

bench-gpu: $(VENV)/.has-bench ## measure this machine's GPUs; update the figures in README and docs
	$(PY) -m benchmarks.gpu $(ARGS)

notebooks: $(VENV)/.has-test ## build and run the notebooks of notebooks/src (ARGS=01 for one)
	$(PY) -m tools.build $(ARGS)

rehearse: $(VENV)/.has-test ## run the starter, mutants and solution of each exercise (ARGS=01 for one notebook)
	$(PY) -m tools.rehearse $(ARGS)

lock: ## resolve all dependencies in an empty environment and write requirements.lock
	@$(check_python)
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch"; \
	"$$scratch/bin/python" -m pip install -qq 'torch==$(TORCH)' -e '.[dev,bench]'; \
	{ echo '# The exact versions that were tested together, as pip constraints: pip install -c requirements.lock'; \
	  echo '# Written by `make lock`. The local part of the torch version (+cpu, +cu130) is removed, so any build fits.'; \
	  "$$scratch/bin/python" -m pip freeze --exclude-editable --exclude pip --exclude setuptools \
	    | sed -E 's/^(torch==[^+]+)\+.*/\1/' \
	    | grep -vE '^(nvidia-|cuda-|triton==)'; \
	} > requirements.lock.new
	mv requirements.lock.new requirements.lock

hooks: $(VENV)/.has-dev ## install the pre-commit hooks, which run before each commit
	$(VENV)/bin/pre-commit install

clean: ## remove caches and the output of tests and builds
	rm -rf build dist test-output .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.egg-info' \) \
	  -type d -prune -exec rm -rf {} +

distclean: clean ## make clean, and remove .venv
	rm -rf $(VENV)

# ----------------------------------------------------------- environment

# `make lock` resolves all other dependencies for this version of torch.
TORCH := 2.13.0

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "cpkit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not installed)." >&2; \
  echo 'Use another interpreter, for example: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12' >&2; exit 1; }
endef

$(PY):
	@$(check_python)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'Could not create $(VENV). On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }

# One stamp per extra of pyproject.toml. The lock file is passed to pip as constraints.
$(VENV)/.has-%: pyproject.toml requirements.lock | $(PY)
	@echo 'Installing cpkit[$*] into $(VENV) (the first time, this downloads torch and takes minutes) ...'
	@[ -e /dev/nvidiactl ] || [ "$$(uname -s)" != Linux ] || $(PY) -c 'import torch' 2>/dev/null || \
	  echo 'No NVIDIA GPU was found. For a much smaller download press Ctrl-C, and run:' \
	  'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make $(or $(MAKECMDGOALS),test)'
	@echo 'Ctrl-C is safe: the next make continues.'
	@$(PY) -m pip install --disable-pip-version-check -c requirements.lock -e '.[$*]'
	@touch $@
