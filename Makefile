# Every developer command is a target here; `make` without a target lists them.
# A target first creates .venv and installs what it needs, if that is missing.

PYTHON ?= python3
NPROC ?=
NAME ?= default
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python

# TORCH names the file of constraints/ that selects torch. The default is the one that .venv has,
# or else cuda where there is an NVIDIA GPU. CPU_BUILD is empty if torch must be a CUDA build.
GPU := $(wildcard /dev/nvidiactl)
IN_VENV := $(patsubst $(VENV)/.torch-%,%,$(wildcard $(VENV)/.torch-*))
TORCH ?= $(or $(IN_VENV),$(if $(GPU),cuda,cpu))
CPU_BUILD := $(filter cpu $(if $(GPU),,oldest),$(TORCH))
CONSTRAINTS := constraints/$(TORCH).txt
ifeq ($(wildcard $(CONSTRAINTS)),)
  $(error TORCH is '$(TORCH)'; it must be one of: $(patsubst constraints/%.txt,%,$(wildcard constraints/*.txt)))
endif

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help lab explore test test-all test-gpu lint format bench bench-gpu notebooks rehearse lock hooks clean distclean

help: ## list the targets
	@echo 'make TARGET [NPROC=4] [NAME=default] [TORCH=cpu|cuda|oldest] [PYTHON=python3] [ARGS=...]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

lab: $(VENV)/.has-notebooks ## start NPROC workers and open JupyterLab on the first notebook
	$(PY) -m cpkit lab --name $(NAME) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

explore: $(VENV)/.has-notebooks ## start NPROC workers and open the live panel alone on a page (for a projector)
	$(PY) -m cpkit explore --name $(NAME) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

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

lock: ## resolve all dependencies in an empty environment; write requirements.* and constraints/
	@$(check_python)
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch"; \
	"$$scratch/bin/python" -m pip install -qq --upgrade pip; \
	"$$scratch/bin/python" -m tools.lock

hooks: $(VENV)/.has-dev ## install the pre-commit hooks, which run before each commit
	$(VENV)/bin/pre-commit install

clean: ## remove caches and the output of tests and builds
	rm -rf build dist test-output .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.egg-info' \) \
	  -type d -prune -exec rm -rf {} +

distclean: clean ## make clean, and remove .venv
	rm -rf $(VENV)

# ----------------------------------------------------------- environment

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "cpkit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not installed)." >&2; \
  echo 'Use another interpreter, for example: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12' >&2; exit 1; }
endef

$(PY):
	@$(check_python)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'Could not create $(VENV). On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }

# Another TORCH makes another file, which is newer than all stamps: everything is installed again.
$(VENV)/.torch-$(TORCH): | $(PY)
	@rm -f $(VENV)/.torch-*
	@touch $@

# One stamp per extra of pyproject.toml.
$(VENV)/.has-%: pyproject.toml requirements.hashes $(CONSTRAINTS) $(VENV)/.torch-$(TORCH)
	@echo 'Installing cpkit[$*] into $(VENV), with $(CONSTRAINTS) (the first time, this takes minutes) ...'
	@echo 'Ctrl-C is safe: the next make continues.'
	@index=$$($(if $(CPU_BUILD),$(PY) -m tools.cpu_index $(CONSTRAINTS))); \
	$(PY) -m tools.install $* -c $(CONSTRAINTS) $$index
	@touch $@
