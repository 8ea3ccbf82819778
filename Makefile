# Everything runs in .venv, which is created on first use by the interpreter PYTHON (3.11 to 3.14).
PYTHON ?= python3
# Threads sleep while they wait for each other: see recipes/demo_environment.sh.
export OMP_WAIT_POLICY ?= PASSIVE
BIN := .venv/bin
SAMPLE := data/sample
RUNS := outputs/sample
CODE := $(wildcard *.py) docs/site_hooks.py mra data_scripts metrics benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help install demo demo-search demo-dad app test test-slow test-faults test-app test-server mutants style quality docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Gradio needs an older Pillow, which resizes images slightly differently from the reference vectors, so the app has its own
# environment.
EXTRAS := dev,deepspeed,tracking,dad,search
.venv-app/installed: EXTRAS := app,app-test

.venv/installed .venv-app/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 14) else f"{sys.executable}: is Python {v[0]}.{v[1]}, expected 3.11 to 3.14; choose another with make PYTHON=python3.13 ...")'
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

install: .venv/installed  ## Create .venv and install the project with its test and training extras

demo: .venv/installed  ## Sample data -> pretrain -> fine-tune -> evaluate -> picture of rankings (12 to 20 minutes on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/sample/demo.sh

demo-search: .venv/installed  ## After demo: index the sample test images and search them by text (under 2 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/sample/demo_search.sh

test: .venv/installed  ## Run the tests (under 10 minutes on 2 cores, offline)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/installed  ## Run the slow tests: full-size models, one step of every recipe
	$(BIN)/python -m pytest -m slow

test-faults: .venv/installed  ## Kill, fill, cut and flip: what commands do on damaged files and full disks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -n 2 --dist worksteal

mutants: .venv/installed  ## Change one thing at a time in the core modules; print how many changes the tests notice
	$(BIN)/python -m tests.mutation.mutants

test-app: .venv-app/installed  ## Test the web page in a real browser (needs chromium; installed with apt-get if permitted)
	@if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; \
		else \
			echo "make test-app needs chromium and chromedriver; on Debian: sudo apt-get install chromium chromium-driver" >&2; exit 1; \
		fi; \
	fi
	.venv-app/bin/python -m pytest -m app tests/scripts/test_app.py tests/scripts/test_app_browser.py tests/scripts/test_space.py

test-server: .venv/installed  ## Test galleries on a real Milvus server (installs one, 60 MB, which listens on all addresses during the tests)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[server-test]'
	$(BIN)/python -m pytest -m server tests/gallery

app: .venv-app/installed  ## Serve the web page on the demo's model and gallery (after make demo-search)
	.venv-app/bin/python app.py --model $(RUNS)/finetune/best --gallery $(RUNS)/search/gallery.db

style: .venv/installed  ## Format the code and sort its imports
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

quality: .venv/installed  ## Check style, types and the direction of imports without changing anything
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/project/test_imports.py

demo-dad: .venv/installed  ## Target dataset -> data factory with tiny models -> pretraining set -> 20 steps (about 4 minutes on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/dad/demo.sh

docs: .venv/installed  ## Build the documentation with the API into site/ (open site/index.html)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:  ## Remove the sample data and the demo's outputs
	rm -rf $(SAMPLE) $(RUNS) outputs/dad/demo
