PYTHON ?= python

.PHONY: install style quality test slow bench torture floors docs release

install:  ## the package with pinned development requirements
	$(PYTHON) -m pip install -r requirements/dev.txt -e .

style:  ## format, and fix what can be fixed automatically
	ruff format .
	ruff check --fix .

quality:  ## checks that a change must pass in addition to the tests
	ruff format --check .
	ruff check .
	mypy

test:
	$(PYTHON) -m pytest

slow:  ## the tests that take minutes
	$(PYTHON) -m pytest -m slow

bench:  ## comparisons with other implementations; tables in benchmarks/README.md
	$(PYTHON) benchmarks/bench_scheduler.py
	$(PYTHON) benchmarks/bench_sample.py --rounds 3
	$(PYTHON) benchmarks/bench_step.py
	@if [ -n "$(DIFFUSERS)" ]; then $(PYTHON) benchmarks/bench_train.py "$(DIFFUSERS)"; \
	else echo "bench_train.py is left out: name a clone of huggingface/diffusers, make bench DIFFUSERS=FOLDER"; fi
	$(PYTHON) benchmarks/bench_threads.py
	$(PYTHON) benchmarks/bench_overhead.py
	$(PYTHON) benchmarks/bench_checkpoint.py
	$(PYTHON) benchmarks/bench_latent_cache.py
	$(PYTHON) benchmarks/bench_data.py epoch
	$(PYTHON) benchmarks/bench_data.py start
	$(PYTHON) benchmarks/bench_streaming.py
	@for subject in rows chain images processes parameters; do $(PYTHON) benchmarks/bench_growth.py $$subject; done
	$(PYTHON) benchmarks/bench_memory.py

torture:  ## guarantees of checkpoints and of hostile input, tested for hours
	$(PYTHON) benchmarks/torture/faults.py
	$(PYTHON) benchmarks/torture/kill.py
	$(PYTHON) benchmarks/torture/kill.py --latents --kills 60 --inside_saves 15
	$(PYTHON) benchmarks/torture/signals.py
	$(PYTHON) benchmarks/torture/hostile_inputs.py
	$(PYTHON) benchmarks/torture/mutations.py
	$(PYTHON) benchmarks/torture/concurrency.py

floors:  ## the test suite with the oldest supported versions, in a separate virtual environment
	rm -rf .venv-floors
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip install -q -r requirements/floors.txt -e .
	.venv-floors/bin/python -m pytest

docs:  ## the pages, into site/; needs the extra `docs`
	$(PYTHON) -m pip install -q -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

release:  ## wheel and sdist of the last commit, checked, into dist/; TAG=v1.2.3 also checks that they are ready to publish
	PYTHON=$(PYTHON) .ci/release $(TAG)
