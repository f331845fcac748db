SHELL := bash
ENV := . scripts/env.sh && use_python dev && use_caches
# One thread: the matrices of the tests are small.
RUN := $(ENV) && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=$$PWD

.PHONY: test lint format unit
test: lint unit

lint:
	@$(RUN) && ruff check . && ruff format --check . && python -m mypy

unit:
	@$(RUN) && python -m pytest $(ARGS)

format:
	@$(RUN) && ruff check --fix . && ruff format .
