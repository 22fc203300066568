# Everything a newcomer types. Each target sets up what it needs; nothing downloads at run time.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# pip's progress and Python's threads, the same everywhere.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline

.PHONY: setup demo test test-all test-web lint docs embedded-model measure effects loop speed clean

setup: $(VENV)/.done

# torch comes first and pinned: a later release would pull gigabytes of CUDA libraries on a CPU.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,web,serve]' --constraint constraints.txt
	touch $@

demo: setup
	$(BIN)/mmlm demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The same on tiny models of all ten families instead of the five that differ most.
test-all: setup
	MMLM_FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The playground in a real browser; needs Chromium (Debian: apt-get install chromium).
test-web: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser -m browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Writes the pages that are made from the code, then the whole site to site/.
docs: setup
	$(BIN)/pip install --quiet --editable '.[docs]' --constraint constraints.txt
	$(BIN)/python tools/build_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tools/check_site.py site

# Trains the small model that ships in mmlm/assets: about an hour on two cores, resumable.
embedded-model: setup
	$(BIN)/python tools/build_embedded_model.py

# Measures the shipped model and writes docs/embedded-model.md: about an hour on two cores.
measure: setup
	$(BIN)/python tools/measure_embedded.py

# What every method changes on the shipped model: docs/effects.md, about an hour, resumable.
effects: setup
	$(BIN)/python tools/measure_effects.py
	$(BIN)/python tools/effects_page.py

# Pairs from the shipped model, a preference training with deepspeed in two processes, and what it
# changes on unseen scenes: docs/loop.md, about half an hour, resumable.
loop: setup
	$(BIN)/python tools/run_loop.py

# Latency of every method as a ratio to plain decoding, on a random model of fixed shape.
speed: setup
	$(BIN)/python -m benchmarks.speed --output benchmarks/results/speed.json

clean:
	rm -rf $(VENV) demo runs .cache build *.egg-info
