# SPDX-License-Identifier: Apache-2.0
# Everything a person does here. `make demo` and `make test` set themselves up, once, in $(VENV); a second run installs nothing.
#
#   PYTHON=python3.12              the interpreter to build the environment with (3.10 or newer)
#   TORCH=torch==2.13.0            the torch to install; anything >= 2.8 is supported
#   TORCH_INDEX=https://...        where the small CPU builds of torch are; used only if it answers within 3 seconds.
#                                  TORCH_INDEX= (empty) takes torch from PyPI, which on Linux comes with CUDA (gigabytes)

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?= --json build/bench.json --csv build/bench.csv --picture build/bench.png --force
BENCH_MOE_ARGS := --moe --seconds 20 --json build/bench-moe.json --csv build/bench-moe.csv --picture build/bench-moe.png --force

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade-strategy only-if-needed

.PHONY: help demo test check test-gpu compile-check bench native clean clean-all
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

demo: $(VENV)/.installed-demo  ## the embedded model with all experts in NVFP4, in transformers: text, loss, errors, sizes
	@$(BIN)/python -m examples.demo $(DEMO_ARGS)

test: $(VENV)/.installed-test  ## all tests that need no GPU
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-test  ## ruff (lint, format) and mypy; edits nothing
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

compile-check: $(VENV)/.installed-test  ## compile every Blackwell kernel for every chip, without one: instructions, registers, spills
	@$(BIN)/python -m tests.compile_check

test-gpu:  ## the tests that need a GPU, with the python3 that is here (torch, cuda-core, pytest); installs nothing
	PYTHONPATH=src python3 -m pytest -m gpu $(PYTEST_ARGS)

# Where python3 has no torch, as on a fresh CPU machine, the environment of `make demo` is used.
HERE_HAS_TORCH = python3 -c 'import torch, safetensors, typer, rich, matplotlib' 2>/dev/null

# Without BENCH_ARGS from outside, a GPU gets the mixture of experts too.
bench:  ## time a shared expert, on a GPU a whole layer too, next to peers and the machine's floor, with the python3 that is here
	@$(HERE_HAS_TORCH) || $(MAKE) --no-print-directory $(VENV)/.installed-demo
	@mkdir -p build
	@if $(HERE_HAS_TORCH); then python=python3; else python=$(BIN)/python; fi; export PYTHONPATH=src; \
	$$python -m nvfp4_experts.cli bench $(BENCH_ARGS) || exit; \
	if [ '$(origin BENCH_ARGS)' = file ] && $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	$$python -m nvfp4_experts.cli bench $(BENCH_MOE_ARGS); fi

native:  ## build the CPU kernel into the source tree, for running with PYTHONPATH=src and without installing
	cmake -S . -B build/native && cmake --build build/native --parallel && cmake --install build/native --prefix src

clean:  ## remove caches and build output
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	rm -f src/nvfp4_experts/kernels/cpu/*.so src/nvfp4_experts/kernels/cpu/*.dylib
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean  ## clean, and remove the environment too
	rm -rf $(VENV)

# --- set-up; each stamp file says that its step is done -----------------------------------------------------------

# What the native library is built from: a change to it installs the package again.
NATIVE := CMakeLists.txt $(wildcard src/nvfp4_experts/kernels/cpu/csrc/*)

# torch comes first and alone: whatever is installed after it finds it there and pulls no other build of it.
$(VENV)/.installed-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)."; \
	    echo "Install one and say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): once, a few minutes."
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "python could not make an environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@index='$(TORCH_INDEX)'; \
	if [ -n "$$index" ] && ! $(PYTHON) -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=3)' \
	    "$$index" 2>/dev/null; then index=; fi; \
	echo "  $(TORCH)$${index:+ from $$index}"; \
	$(PIP) $${index:+--extra-index-url "$$index"} '$(TORCH)'
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch pyproject.toml $(NATIVE)
	@echo "  nvfp4-experts, transformers, matplotlib"
	@$(PIP) -e '.[transformers,plot]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-demo requirements/test.txt requirements/oracles.txt
	@echo "  test tools and the oracle packages"
	@$(PIP) -e '.[transformers,plot,dev]' -r requirements/test.txt
	@$(PIP) --no-deps -r requirements/oracles.txt
	@touch $@
