# Everything runs in .venv, which is made on first use; PYTHON chooses the interpreter that makes it (3.10 to 3.12).
PYTHON ?= python3
BIN := .venv/bin
SAMPLE := data/sample
RUNS := outputs/sample
CODE := configuration_mra.py losses_mra.py modeling_mra.py processing_mra.py train_pretrain.py train_finetune.py \
	eval_retrieval.py convert_checkpoint.py app.py mra_training mra_retrieval data_scripts metrics benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-app app style quality clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,deepspeed,tracking,dad,app]'
	touch $@

install: .venv/installed  ## Make .venv and install the project with its test and training extras

demo: .venv/installed  ## Sample data -> pretrain -> fine-tune -> evaluate -> ranked picture (about 13 minutes on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/sample/demo.sh

test: .venv/installed  ## Run the tests (under 10 minutes on 2 cores, offline)
	$(BIN)/python -m pytest

test-slow: .venv/installed  ## Run the slow tests: full-size models, one step of every recipe
	$(BIN)/python -m pytest -m slow

test-app: .venv/installed  ## Use the web page in a real browser (needs chromium; installed with apt-get where it may)
	@if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; \
		else \
			echo "make test-app needs chromium and chromedriver; on Debian: sudo apt-get install chromium chromium-driver" >&2; exit 1; \
		fi; \
	fi
	$(BIN)/python -c 'import selenium' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[app-test]'
	$(BIN)/python -m pytest -m app tests/test_app_browser.py

app: .venv/installed  ## Serve the web page on the demo's model and gallery (after make demo-search)
	$(BIN)/python app.py --model $(RUNS)/finetune/best --gallery $(RUNS)/gallery.db

style: .venv/installed  ## Format the code and sort its imports
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

quality: .venv/installed  ## Check style without changing anything
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

clean:  ## Remove the sample data and the demo's outputs
	rm -rf $(SAMPLE) $(RUNS)
