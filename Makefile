# Everything a fresh clone needs is Python >= 3.11 and make: `make demo`, `make test`.
# Each target sets up first; the stamp makes that free when nothing has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCK := $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
	--python-version 3.11 --no-annotate --custom-compile-command "make lock"

.PHONY: help setup demo test test-engine soak fuzz audit lint format types wheel bench-gpu bench-proxy readme lock clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## a virtual environment in .venv with the pinned dependencies

demo: $(STAMP)  ## stock Ollama beside lopsided on five simulated machines (ONCE=1 ends after the tables)
	@$(BIN)/lopsided demo $(if $(ONCE),--once)

test: $(STAMP)  ## all tests
	@$(BIN)/python -m pytest --ignore=tests/engine $(ARGS)

test-engine: $(STAMP)  ## the whole chain with a real llama-server, compiled the first time (10 minutes; needs a C++ compiler)
	@$(BIN)/python -m tests.engine.build
	@$(BIN)/python -m pytest tests/engine $(ARGS)

soak: $(STAMP)  ## 30 minutes of mixed traffic with faults through a real proxy (SECONDS=60: shorter)
	@$(BIN)/python -m tests.soak --seconds $(or $(SECONDS),1800)

fuzz: $(STAMP)  ## ten minutes of damaged files and requests (SECONDS=600), guided by atheris where that installs
	@$(PIP) install --only-binary :all: 'atheris>=3' 2>/dev/null || echo "no atheris for this Python: the mutation is blind"
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600)

audit: $(STAMP)  ## known vulnerabilities of the pinned dependencies, from PyPI's database
	@$(BIN)/uv tool run pip-audit --strict --disable-pip --require-hashes --requirement requirements/runtime.lock || \
		{ echo "Not audited, or not clean: see above. The data is PyPI's own; a mirror has none, and then nothing was checked."; exit 1; }

lint: $(STAMP)  ## ruff's rules and formatting, nothing changed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)  ## ruff's formatting and safe fixes, in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP)  ## mypy --strict
	@$(BIN)/mypy

wheel: $(STAMP)  ## dist/lopsided-*.whl
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

bench-gpu: $(STAMP)  ## stock Ollama beside lopsided on this machine's two NVIDIA GPUs (docs/benchmarks.md; ARGS=…)
	@$(BIN)/python -m benchmarks.gpu.bench --out bench-gpu.jsonl $(ARGS)

bench-proxy: $(STAMP)  ## what the proxy costs beside nginx, the obvious proxy and LiteLLM (QUICK=1: two minutes; docs/performance.md)
	@$(BIN)/python -m benchmarks.proxy --out .cache/bench-proxy.json $(if $(QUICK),--quick) $(ARGS)

readme: $(STAMP)  ## the demo's table in the README, as it is printed now
	@$(BIN)/python -m tests.test_readme

lock: $(STAMP)  ## pins anew what pyproject.toml asks for; UPGRADE=1 takes the newest versions
	$(LOCK) pyproject.toml --group dev --output-file requirements/dev.lock $(if $(UPGRADE),--upgrade)
	$(LOCK) pyproject.toml --constraint requirements/dev.lock --output-file requirements/runtime.lock
	$(LOCK) --group build --constraint requirements/dev.lock --output-file requirements/build.lock

clean:  ## removes what the targets above made, but for .cache (the compiled engine) and measured rows
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lopsided needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make setup PYTHON=python3.12")'
	@echo "Setting up $(VENV): the pinned dependencies, about a minute on a new machine"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes --requirement requirements/dev.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
