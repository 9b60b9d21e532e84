# Two commands matter: `make demo` and `make test`. Both start from nothing but Python >= 3.11 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL ?= smollm2-135m
MEMORY ?= 900MiB

.PHONY: demo test lint unit oracles readme bench docs package clean help
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tradespace needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing; install it (Debian: apt install python3-venv) and run make again"; exit 1; }
	@touch $@

$(VENV)/.engine: $(VENV)/.created pyproject.toml
	@echo "to download: PyTorch and a few small packages, about 200 MB where the index has a CPU build (Linux on x86 from PyPI: a CUDA build, about 3 GB)"
	@command -v nvidia-smi > /dev/null 2>&1 || echo "no NVIDIA GPU here: for the small build, first run $(PIP) install torch --index-url URL with the CPU index that pytorch.org names"
	@echo "installing tradespace and PyTorch into $(VENV) …"
	@$(PIP) install -q -e '.[engine]'
	@touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml
	@echo "installing tradespace with its test tools into $(VENV) …"
	@$(PIP) install -q -e '.[test]'
	@touch $@ $(VENV)/.engine

demo: $(VENV)/.engine ## install, fetch SmolLM2-135M-Instruct, plan, generate, print predicted against measured
	@$(BIN)/tradespace demo $(MODEL) --memory $(MEMORY)

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-cache

test: lint ## ruff, pyright, import-linter, pytest
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

oracles: $(VENV)/.test ## compare with llama.cpp (compiles it: minutes) and refresh the recorded references
	@$(PIP) install -q 'llama-cpp-python>=0.3.16'
	@$(BIN)/python -m pytest tests/oracles tests/model/test_recorded_references.py -p no:xdist

readme: $(VENV)/.engine ## render the README's tables from results/
	@$(BIN)/python -m tradespace.lab.readme

bench: $(VENV)/.engine ## re-measure what the README states (alone on the machine; about ten minutes)
	@$(BIN)/tradespace lab run all

docs: $(VENV)/.test ## build the documentation's site, strictly, into build/site
	@$(PIP) install -q -e '.[docs]'
	@$(BIN)/mkdocs build --strict --quiet && echo "build/site/index.html"

package: $(VENV)/.created ## build wheel and sdist into dist/, install the wheel into a clean environment and try it there
	@rm -rf dist build/smoke && $(PIP) install -q build && $(BIN)/python -m build --outdir dist . > /dev/null
	@$(PYTHON) -m venv build/smoke && build/smoke/bin/python -m pip install -q --disable-pip-version-check dist/*.whl
	@cd build/smoke && bin/python -c 'import importlib.util as u; assert u.find_spec("torch") is None' && bin/tradespace --version \
	  && bin/tradespace plan llama-2-70b --memory 40GB --device a100-40gb > plan.txt && grep -q best: plan.txt && bin/tradespace fit --memory 8GB --device rtx-4090 --json > fit.json
	@echo "wheel and sdist in dist/ are good"

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
