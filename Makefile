SHELL := bash
ENV := . scripts/env.sh && use_python dev && use_caches
# One thread: the matrices of the tests are small.
RUN := $(ENV) && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=$$PWD

.PHONY: test pins lint format unit lines install page cluster real gpu docs faults
test: lint unit lines

# Do the pinned versions resolve on other machines? Needs the package index.
pins:
	@$(ENV) && scripts/check_pins.sh

lint:
	@$(RUN) && ruff check . && ruff format --check . && python -m mypy

unit:
	@$(RUN) && python -m pytest $(ARGS)

# Lines of source by package, and of the core.
lines:
	@$(RUN) && python scripts/count_lines.py

# The wheel in a fresh environment, which trains and converts. Needs the package index; about five minutes.
install:
	@$(RUN) && python -m pytest -m slow -o faulthandler_timeout=3600 tests/test_install.py $(ARGS)

# The page of `fovlm export` in Chromium. Needs the npm registry once, and runs/quickstart (`./launch.sh quickstart`); its
# figures are printed.
page:
	@$(RUN) && python -m fovlm.export.npm && python -m pytest -m slow -s -o faulthandler_timeout=3600 tests/export $(ARGS)

# Two nodes on this machine, over ssh and under SLURM. As root, on Debian or Ubuntu; installs what is missing with
# apt-get. About ten minutes on two cores.
cluster:
	@$(RUN) && python -m pytest -m cluster -o faulthandler_timeout=3600 $(ARGS)

# Real weights and data; tests/test_real.py and test_scenes_study.py say what they need. About half an hour on two cores.
real:
	@$(RUN) && python -m pytest -m real -o faulthandler_timeout=3600 $(ARGS)

# For the day a GPU is at hand: its tests, the kernels and the training step, with CSV files under benchmarks/results.
# Uses the Python of FOVLM_PYTHON if that is set, and says what it leaves out for want of packages.
gpu:
	@$(RUN) && python -m benchmarks.gpu

# What goes wrong with a run or its files, tried on purpose, into docs/faults.md. SCALE=0.25 tries a quarter.
faults:
	@$(RUN) && FOVLM_FAULTS=$${SCALE:-1} python -m pytest tests/faults -o faulthandler_timeout=3600 $(ARGS)

format:
	@$(RUN) && ruff check --fix . && ruff format .

# The site, into site/; tests/test_docs.py builds it in the same way.
docs:
	@$(RUN) && python -m mkdocs build --strict
