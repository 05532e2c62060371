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

.PHONY: help setup demo test test-fast gpu fuzz lint format docs bench conformance mutations space space-folder clean

help:
	@echo "make demo         sets up, trains a small YAN on simulated bAbI stories, reloads it and evaluates it (about 4 minutes)"
	@echo "make test-fast    runs our own tests but the slow ones (two minutes)"
	@echo "make test         runs all tests, then Transformers' and PEFT's own (about twenty minutes)"
	@echo "make fuzz         draws 5,000 calls of generate, new ones every time (about ten minutes)"
	@echo "make lint         checks style"
	@echo "make docs         builds the documentation into site/"
	@echo "make conformance  runs Transformers' and PEFT's own tests against YAN (TRANSFORMERS=5.17.0: in .venv-5.17.0)"
	@echo "make mutations    seeds bugs and shows which of our tests catch them (about ten minutes)"
	@echo "make bench        measures speed"
	@echo "make gpu          everything that needs a GPU: tests, speed, profile, training (about 25 minutes, resumable)"
	@echo "make space        opens the web page, on YAN_RESTORATION=FOLDER or the models in checkpoints/"
	@echo "make space-folder gathers the page, the package and the models in build/space, ready to push as a Space"

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

test-fast: setup
	@echo "Runs the tests that are not marked slow: two minutes on two cores."
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -q -m "not slow"

test: setup
	@echo "Runs all tests, then Transformers' and PEFT's own: about twenty minutes on two cores."
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -q
	$(MAKE) conformance

fuzz: setup
	YAN_HF_FUZZ=5000 OMP_NUM_THREADS=1 $(RUN) -m pytest -q modeling_tests/generation/test_fuzz_generate.py

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

# A broken link, an exported name without documentation or a table that is not the results' is an error (with
# --quiet mkdocs would overlook warnings).
docs: setup
	$(RUN) -m pytest -q modeling_tests/examples/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "site/index.html"

bench: setup
	@echo "Compares the latency of YAN and other decoders at the demo's size: about ten minutes on two cores."
	$(RUN) benchmarks/speed.py --size tiny --lengths 16 64 256 --output runs/speed.json

gpu: setup
	@echo "Tests and measures everything that needs a GPU: at most 25 minutes; a call that was cut short goes on."
	$(RUN) benchmarks/gpu.py

space: setup
	$(RUN) -m pip install --quiet -e ".[space]"
	$(RUN) spaces/yan/app.py

space-folder:
	rm -rf build/space
	mkdir -p build/space
	cp -R spaces/yan/. src/yan_hf build/space/
	if [ -d checkpoints ]; then cp -RL checkpoints build/space/; fi
	find build/space -name __pycache__ -prune -exec rm -r {} +

clean:
	rm -rf $(VENV) build dist site runs outputs src/*.egg-info
