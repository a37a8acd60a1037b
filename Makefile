# One place for every command: `make demo`, `make test`, and those of `make help`.
# Each does all of its own set-up; nothing outside this folder is touched.

PYTEST = $(BIN)/python -m pytest -n auto
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help install demo lint test test-slow parity bench bench-lm exchange lock clean

help:
	@echo "make install    build .venv from nothing (idempotent)"
	@echo "make demo       train and compare three SAEs; prints a table, writes a report"
	@echo "make test       lint, types, import layers, whole test suite"
	@echo "make test-slow  the tests that train for more than seconds"
	@echo "make parity DIR=folder  replay recorded runs of the Top-AFA authors' code"
	@echo "make bench      speed of steps, of training and of reading, beside others; over an hour"
	@echo "make bench-lm   speed of reading activations, beside TransformerLens and PyTorch"
	@echo "make exchange   SAEs to and from SAELens, sparsify and dictionary_learning"
	@echo "make lock       renew requirements.lock from what is installed"

install: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"sae_jax needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; use make PYTHON=python3.x")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/python launch.py --experiment=demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(PYTEST) -m 'not slow' --ignore=tests/on_devices
	$(PYTEST) -m 'not slow' tests/on_devices

test-slow: install
	$(PYTEST) -m slow -rP --ignore=tests/on_devices
	$(PYTEST) -m slow -rP tests/on_devices

PEERS := .venv-peers
PEERS_PYTHON ?= python3.11

$(PEERS)/.installed:
	$(PEERS_PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 transformer_lens==3.2.1 'transformers<5'
	@touch $@

bench-lm: install $(PEERS)/.installed
	$(BIN)/python launch.py --experiment=bench_lm

SAELENS  := .venv-saelens
SPARSIFY := .venv-sparsify

$(SAELENS)/.installed:
	$(PEERS_PYTHON) -m venv --clear $(SAELENS)
	$(SAELENS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 sae-lens==6.54.12
	@touch $@

$(SPARSIFY)/.installed:
	$(PEERS_PYTHON) -m venv --clear $(SPARSIFY)
	$(SPARSIFY)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 eai-sparsify==1.3.3
	@touch $@

bench: install $(SAELENS)/.installed $(SPARSIFY)/.installed $(PEERS)/.installed
	$(BIN)/python launch.py --experiment=bench
	$(BIN)/python launch.py --experiment=bench_train
	$(BIN)/python launch.py --experiment=bench_lm
	$(BIN)/python launch.py --experiment=bench_growth
	$(BIN)/python launch.py --experiment=bench_ensemble

DICTLEARN := .venv-dictlearn

# Its version of nnsight wants transformers before 5, and torchvision that fits PyTorch
# or none at all.
$(DICTLEARN)/.installed:
	$(PEERS_PYTHON) -m venv --clear $(DICTLEARN)
	$(DICTLEARN)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 dictionary-learning==0.1.0 'transformers>=4.57,<5'
	$(DICTLEARN)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

exchange: install $(SAELENS)/.installed $(SPARSIFY)/.installed $(DICTLEARN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements.lock torch==2.13.0
	$(BIN)/python launch.py --experiment=exchange

DIR ?= tests/golden
parity: install
	$(BIN)/python -m tests.parity $(DIR)

# Not pinned: PyTorch, which each machine needs another build of, and what it brings.
TORCHS_OWN = torch|sympy|mpmath|networkx|setuptools
lock: install
	$(BIN)/python -m pip freeze --exclude-editable --exclude sae_jax \
	  | grep -viE '^($(TORCHS_OWN))==' > requirements.lock

clean:
	rm -rf $(VENV) $(PEERS) $(SAELENS) $(SPARSIFY) $(DICTLEARN) \
	  .pytest_cache .mypy_cache .ruff_cache
