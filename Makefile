# Two commands do everything on a machine with Python 3.10 or newer: `make demo` and `make test`.

PYTHON ?= python3
# Another version of Transformers, as in `make conformance TRANSFORMERS=5.17.0`, gets an environment of its own.
TRANSFORMERS ?=
VENV ?= .venv$(if $(TRANSFORMERS),-$(TRANSFORMERS))
# One version for everybody who calls make; `pyproject.toml` states the range. Override with `make TORCH=torch==2.11.0`,
# or `make TORCH="torch --index-url https://download.pytorch.org/whl/cpu"` where the CPU build must be named.
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test lint format bench conformance mutations clean

help:
	@echo "make demo         sets up, trains a small YAN on simulated bAbI stories, reloads it and evaluates it (about 4 minutes)"
	@echo "make test         sets up and runs all tests"
	@echo "make lint         checks style"
	@echo "make conformance  runs Transformers' and PEFT's own tests against YAN (TRANSFORMERS=5.17.0: in .venv-5.17.0)"
	@echo "make mutations    seeds bugs and shows which of our tests catch them (about ten minutes)"
	@echo "make bench        measures speed"

setup: $(VENV)/.ready

# torch first and by itself: any other package that asks for it could choose another build.
$(VENV)/.ready: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet -e ".[dev]" $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS))
	touch $@

demo: setup
	@echo "Trains a small YAN from scratch on simulated bAbI stories, saves it, reloads it in a new process through the"
	@echo "Auto classes and evaluates it on held-out questions: two to five minutes of training on two cores."
	$(RUN) examples/demo.py

test: setup
	@echo "Runs the tests, then Transformers' and PEFT's own: about fifteen minutes on two cores."
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -q
	$(MAKE) conformance

conformance: setup
	OMP_NUM_THREADS=1 $(RUN) modeling_tests/conformance/run.py

mutations: setup
	$(RUN) modeling_tests/conformance/mutations.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: setup
	@echo "Compares the latency of YAN and other decoders at the demo's size: about ten minutes on two cores."
	$(RUN) benchmarks/speed.py --size tiny --lengths 16 64 256 --output runs/speed.json

clean:
	rm -rf $(VENV) build dist runs outputs src/*.egg-info
