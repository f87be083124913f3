# Every developer action has a name here. `make` alone lists them.
# Each target first makes .venv and installs what it needs; a second call finds that done.

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

test: $(VENV)/.has-test ## run the tests, cheapest first, but not the slow ones (ARGS goes to pytest)
	$(PY) -m pytest $(ARGS)

test-all: test ## the same, then the tests marked slow
	$(PY) -m pytest --slow $(ARGS)

lint: $(VENV)/.has-dev ## ruff, mypy --strict on cpkit, shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck launch_workers.sh .ci/run

format: $(VENV)/.has-dev ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test-gpu: $(VENV)/.has-test ## the tests that need a GPU, with 2, 4 and 8 ranks on it (ARGS goes to pytest)
	$(PY) -m pytest -m gpu $(ARGS)

bench: $(VENV)/.has-bench ## measure beside gloo and Open MPI, and fill README's figures
	$(PY) -m benchmarks.run $(ARGS)

bench-gpu: $(VENV)/.has-bench ## the same on this machine's GPUs
	$(PY) -m benchmarks.gpu $(ARGS)

notebooks: $(VENV)/.has-test ## make the notebooks of notebooks/src: run, pictures included (ARGS=01 for one)
	$(PY) -m tools.build $(ARGS)

rehearse: $(VENV)/.has-test ## try starter, mutants and solution of every exercise (ARGS=01 for one notebook)
	$(PY) -m tools.rehearse $(ARGS)

lock: ## resolve all dependencies anew in an empty environment and write requirements.lock
	@$(check_python)
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch"; \
	"$$scratch/bin/python" -m pip install -qq 'torch==$(TORCH)' -e '.[dev,bench]'; \
	{ echo '# The exact versions that were tested together, used as pip constraints: pip install -c requirements.lock'; \
	  echo '# Written by `make lock`. torch carries no local part (+cpu, +cu130), so any build of that version fits.'; \
	  "$$scratch/bin/python" -m pip freeze --exclude-editable --exclude pip --exclude setuptools \
	    | sed -E 's/^(torch==[^+]+)\+.*/\1/' \
	    | grep -vE '^(nvidia-|cuda-|triton==)'; \
	} > requirements.lock.new
	mv requirements.lock.new requirements.lock

hooks: $(VENV)/.has-dev ## run the pre-commit hooks before each commit from now on
	$(VENV)/bin/pre-commit install

clean: ## remove caches and what tests and builds left
	rm -rf build dist test-output .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.egg-info' \) \
	  -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# ----------------------------------------------------------- environment

# The torch that `make lock` resolves everything else around.
TORCH := 2.13.0

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "cpkit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
  echo 'Name another, for example: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12' >&2; exit 1; }
endef

$(PY):
	@$(check_python)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'Could not make $(VENV). On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }

# One stamp for each extra of pyproject.toml. pip gets the lock file as constraints, nothing else.
$(VENV)/.has-%: pyproject.toml requirements.lock | $(PY)
	@echo 'Installing cpkit[$*] into $(VENV) (the first time downloads torch and takes minutes) ...'
	@[ -e /dev/nvidiactl ] || [ "$$(uname -s)" != Linux ] || $(PY) -c 'import torch' 2>/dev/null || \
	  echo 'No NVIDIA GPU here. For a much smaller download see docs/troubleshooting.md, "Installing without a GPU".'
	@$(PY) -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[$*]'
	@touch $@
