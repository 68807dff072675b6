# Each target makes the environment it needs, once, inside this folder. `make PYTHON=/path/to/python demo` names the
# interpreter; without it the first of python3.11, python3.12, python3.13 and python3 that works and is >= 3.11 is taken.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint coverage bench acceptance reference ascend-stack transformers4 clean
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# Nothing is written outside this folder but pip's cache.
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib

# An interpreter may be a shim that does not run, or lack ensurepip (Debian without python3-venv).
IS_FIT := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
FIND_PYTHON = for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	if "$$python" -c '$(IS_FIT)' 2>/dev/null; then echo "$$python"; exit; fi; done; \
	echo "nermill: no Python >= 3.11 with venv found$(if $(PYTHON), at $(PYTHON)); name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1

DEMO := .venv-demo
VENV := .venv
ASCEND := .venv-ascend
TRANSFORMERS4 := .venv-transformers4
OLD_TRANSFORMERS := 4.48.3
PINS := pyproject.toml constraints.txt
SAMPLE := model_build/demo/sample/*.conll
READ := import glob, pyarrow.parquet as p; t = p.read_table(sorted(glob.glob("out/demo/run=*/part-*.parquet"))); \
	print(t.num_rows, "documents,", sum(map(len, t["entities"].to_pylist())), "entities")

help:
	@echo "make demo        the main command on this machine, with the bundled model and sample"
	@echo "make test        unit and integration tests, without those that are marked slow"
	@echo "make test-all    all unit and integration tests"
	@echo "make coverage    branch coverage of make test-all, worker processes included"
	@echo "make reference   the generated and recorded blocks of the documentation, made anew"
	@echo "make lint        ruff, mypy, import contracts"
	@echo "make acceptance  kills, restarts and resumes, at length"
	@echo "make bench       throughput on this machine"
	@echo "make ascend-stack   the builder on Python 3.10 and torch 2.1 (make PYTHON=/path/to/python3.10 ascend-stack)"
	@echo "make transformers4  the builder's tests on transformers 4"
	@echo "make clean       removes environments, caches and outputs"

demo: $(DEMO)/.made
	@rm -rf out/demo
	$(DEMO)/bin/nermill run $(SAMPLE) --out out/demo
	$(DEMO)/bin/nermill show out/demo/run=* --limit 5
	@echo; echo "The table is out/demo/run=*/part-*.parquet; this line reads it:"
	$(DEMO)/bin/python -c '$(READ)'

test: $(VENV)/.made
	$(VENV)/bin/python -m pytest -n 2 -m "not slow" $(TESTS)

test-all: $(VENV)/.made
	$(VENV)/bin/python -m pytest $(TESTS)

coverage: $(VENV)/.made
	rm -f .coverage .coverage.*
	$(VENV)/bin/python -m coverage run -m pytest $(TESTS)
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report

reference: $(VENV)/.made
	$(VENV)/bin/python -m tests.reference

lint: $(VENV)/.made
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

acceptance: $(VENV)/.made
	$(VENV)/bin/python -m pytest tests/acceptance --timeout 1800 $(TESTS)

bench: $(VENV)/.made
	$(VENV)/bin/python -m tests.benchmarks

# What Ascend hosts have. Gigabytes, since PyPI's torch 2.1.0 brings CUDA along; not part of `make test`.
ascend-stack: $(ASCEND)/.made
	rm -rf build/ascend
	$(ASCEND)/bin/python -m nermill.model_build.demo.recover --out build/ascend/checkpoint
	$(ASCEND)/bin/nermill-build compile build/ascend/checkpoint --out build/ascend/artifact --backend torch
	$(ASCEND)/bin/nermill-build verify build/ascend/artifact --checkpoint build/ascend/checkpoint

# The builder against transformers 4 as well: `make test` has 5.
transformers4: $(TRANSFORMERS4)/.made
	$(TRANSFORMERS4)/bin/python -m pytest tests/unit/model_build tests/integration/model_build

clean:
	rm -rf $(DEMO) $(VENV) $(ASCEND) $(TRANSFORMERS4) .cache .coverage .coverage.* out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find producer worker model_build tests -name __pycache__ -type d -exec rm -rf {} +

$(ASCEND)/.made: $(PINS)
	python="$$(command -v $(or $(PYTHON),python3.10))"; rm -rf $(ASCEND); "$$python" -m venv $(ASCEND)
	$(ASCEND)/bin/python -m pip install --quiet --use-pep517 torch==2.1.0 transformers==$(OLD_TRANSFORMERS) 'numpy<2' onnx safetensors -e .
	touch $@

$(TRANSFORMERS4)/.made: $(PINS)
	@$(call MAKE_VENV,$(TRANSFORMERS4),dev,build)
	$(TRANSFORMERS4)/bin/python -m pip install --quiet transformers==$(OLD_TRANSFORMERS)

$(DEMO)/.made: $(PINS)
	@$(call MAKE_VENV,$(DEMO),worker$(COMMA)embedded)

# The tests that need torch run where it is pinned: on Python 3.11.
$(VENV)/.made: $(PINS)
	@$(call MAKE_VENV,$(VENV),dev,build)

COMMA := ,
# --use-pep517: old pips would run setup.py of the one source package (seqeval) without what it needs.
define MAKE_VENV
set -euo pipefail; \
if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	python="$$($(FIND_PYTHON))"; \
	echo "making $(1) with $$("$$python" --version)"; \
	rm -rf $(1); "$$python" -m venv $(1); \
fi; \
extras="$(2)"; \
if [ -n "$(3)" ] && $(1)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then extras="$(2),$(3)"; fi; \
echo "installing nermill[$$extras]"; \
$(1)/bin/python -m pip install --quiet --use-pep517 -c constraints.txt -e ".[$$extras]"; \
touch $@
endef
