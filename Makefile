# Fresh clone → own .venv → what was asked for. Nothing is done by hand before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/demo
# Of the tests; each has one thread.
WORKERS ?= 2

export WANDB_MODE ?= offline
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: install demo test test-full test-gpu check clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/rlhf run recipes/demo --output-dir $(RUN)
	$(BIN)/rlhf report $(RUN)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-full: $(INSTALLED)
	$(BIN)/python -m pytest -m full -n $(WORKERS) --dist worksteal

# The last line is JSON: memory and tokens per second of each run. Without a GPU all are skipped, and it says so.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/make_demo_data.py --check

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
