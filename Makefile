PYTHON ?= python

.PHONY: install style quality test slow bench torture floors docs

install:  ## the package with everything that development needs, pinned
	$(PYTHON) -m pip install -r requirements/dev.txt -e .

style:  ## format and mend what can be mended
	ruff format .
	ruff check --fix .

quality:  ## what a change must pass beside the tests
	ruff format --check .
	ruff check .
	mypy

test:
	$(PYTHON) -m pytest

slow:  ## the tests that take minutes
	$(PYTHON) -m pytest -m slow

bench:  ## ratios against named peers; tables in benchmarks/README.md
	$(PYTHON) benchmarks/bench_scheduler.py
	$(PYTHON) benchmarks/bench_step.py
	$(PYTHON) benchmarks/bench_checkpoint.py

torture:  ## what checkpoints promise, tried for an hour
	$(PYTHON) benchmarks/torture/faults.py
	$(PYTHON) benchmarks/torture/kill.py
	$(PYTHON) benchmarks/torture/signals.py

floors:  ## the suite on the oldest supported diffusers, in a virtual environment of its own
	rm -rf .venv-floors
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip install -q -r requirements/floors.txt -e .
	.venv-floors/bin/python -m pytest

docs:  ## the pages, into site/; needs the extra `docs`
	$(PYTHON) -m pip install -q -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
