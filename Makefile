# Every target makes the environment it needs, once: nothing but make and Python >= 3.10 is assumed.
#   make demo PYTHON=python3.12     another interpreter
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo     Linux without a GPU: smaller torch
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint format docs bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    an album of photos becomes a personal 3D generator; report in out/demo"
	@echo "make test    the tests (without those marked slow or cuda)"
	@echo "make lint    ruff and mypy        make format  let ruff rewrite the files"
	@echo "make docs    docs/_build/html     make bench   the benchmarks, one after the other"
	@echo "make clean   remove what the other targets built, .venv included (out/ stays)"

demo: .venv/.ready
	@$(BIN)/convlora eg3d demo --out out/demo

test: .venv/.ready
	@$(BIN)/python -m pytest

lint: .venv/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: .venv/.ready-docs
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Each file in benchmarks/ is a program; names that start with _ are shared code. On a GPU: make bench DEVICE=cuda
DEVICE ?= cpu
bench: .venv/.ready
	@for file in benchmarks/[!_]*.py; do \
	  echo "== $$file"; $(BIN)/python "$$file" --device $(DEVICE) || exit 1; \
	done

clean:
	rm -rf .venv build dist *.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find convlora integrations tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is touched only after pip succeeded, so an interrupted installation is taken up again.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  found=$$($(PYTHON) -V 2>&1) || found="not a program that runs here"; \
	  echo "convlora needs Python >= 3.10; '$(PYTHON)' is $$found." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "preparing .venv (once; PyTorch is the large part)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { \
	  echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP_INSTALL) -e ".[dev,lab,eg3d,faces]"
	@touch $@

.venv/.ready-docs: .venv/.ready
	@$(PIP_INSTALL) -e ".[docs]"
	@touch $@
