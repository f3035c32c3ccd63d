# Two commands: `make align` proves, `make test` checks. Both build .venv on first use and reuse it afterwards.

SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
FORMERS := .venv-formers

.PHONY: align test test-slow test-formers table clean

# `align` exits 1 when the run worked but some loss differs in its last bits. Its summary says so; that is a result,
# not a failed build. A Python crash exits 1 as well, so the summary must be there for a 1 to pass.
align: $(VENV)/.base
	PYTHONUNBUFFERED=1 $(BIN)/align run tiny-fp32 --numerics torch | tee $(VENV)/align.log \
	  || { test $$? -eq 1 && grep -q '^main_matches=' $(VENV)/align.log; }

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# PaddleFormers holds numpy at 1.26 and brings over a gigabyte: an environment of its own.
test-formers: $(FORMERS)/.dev
	$(FORMERS)/bin/python -m pytest tests/single_card_tests/formers

# The stamps are older than pyproject.toml exactly when the dependencies may have changed. Installs are editable,
# so the environment always runs the working tree.
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[torch]"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev,torch,sft,parquet,tensorboard,visualdl]"
	touch $@

$(FORMERS)/.dev: pyproject.toml
	test -x $(FORMERS)/bin/python || $(PYTHON) -m venv $(FORMERS)
	$(FORMERS)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[formers,sft]" pytest
	touch $@

# The table of numeric switches in the README, from the code.
table: $(VENV)/.base
	$(BIN)/paddledsv4 numerics --numerics paddle --write README.md

clean:
	rm -rf $(VENV) $(FORMERS) build dist *.egg-info
