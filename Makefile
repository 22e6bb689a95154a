.PHONY: setup train up down test test-fast check soak bench gpu

STAMP := .venv/.ready
MINUTES := 60

setup: $(STAMP)
	@:

$(STAMP): requirements.lock pyproject.toml
	@echo "Preparing .venv (about a minute; torch is large)"
	@test -x .venv/bin/python || python3 -m venv .venv
	@sed -n '/^uv==/,/[^\]$$/p' requirements.lock > .venv/uv.lock
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.lock
ifdef UV_TORCH_BACKEND
	@sed -E -f deployments/cpu-build.sed requirements.lock > .venv/requirements.lock
	@.venv/bin/uv pip sync --quiet --compile-bytecode .venv/requirements.lock
else
	@.venv/bin/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock
endif
	@.venv/bin/uv pip install --quiet --no-deps --build-constraints requirements.lock --require-build-hashes --editable .
	@touch $@

train: setup
	@.venv/bin/nightshift train

up: setup
	@.venv/bin/nightshift up

down: setup
	@.venv/bin/nightshift down

test: setup
	@.venv/bin/python -m pytest

test-fast: setup
	@.venv/bin/python -m pytest -m 'not soak and not slow'

soak: setup
	@.venv/bin/python -m tests.faults.soak
	@.venv/bin/python -m pytest -m soak --numprocesses 0
	@FUZZ_CASES=2000 .venv/bin/python -m pytest tests/fuzz --timeout 3600
	@.venv/bin/python -m tests.faults.nights --minutes $(MINUTES)

bench: setup
	@test -x .venv-bench/bin/python || .venv/bin/uv venv --quiet .venv-bench --python .venv/bin/python
	@.venv/bin/uv pip install --quiet --compile-bytecode --python .venv-bench --constraints requirements.lock --group bench --editable .
	@.venv-bench/bin/python benchmarks/results.py

check: setup
	@.venv/bin/ruff format --check
	@.venv/bin/ruff check
	@.venv/bin/mypy
	@.venv/bin/lint-imports

# Without setup: the machine with the GPU may have no network.
gpu:
	@PYTHONPATH=.:$$PYTHONPATH $(firstword $(wildcard .venv/bin/python) python3) benchmarks/gpu.py
