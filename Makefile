# Two commands matter: `make demo` and `make test`.  Both need Python 3.11 and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
STAMP := .venv/.complete
# The site has an environment of its own: no test needs what builds it.
SITE_STAMP := .venv-docs/.complete
PAGES := build/pages
# Processes that share the tests, one thread each: of matrices this small two threads do no more than
# one, and threads that outnumber the cores wait for each other.
JOBS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal
# PyPI's Linux build of torch drags in several GB of CUDA libraries; this index has the CPU build.
# Out of reach or empty is fine: pip then takes the version it finds elsewhere.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: help demo test test-slow test-gpu lint format docs picture site clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The stamp is written last, so an interrupted install is never taken for a complete one.
.venv: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvedit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --no-deps --retries 1 --extra-index-url "$(TORCH_INDEX)" "$$(grep '^torch==' requirements.lock)"
	$(PY) -m pip install -r requirements.lock
	$(PY) -m pip install --no-deps -e .
	touch $@

demo: $(STAMP)  ## the main job, for real, in a temporary store
	$(PY) -m tests.demo

test: lint  ## ruff, mypy --strict and pytest; JOBS=N processes share the tests
	$(PYTEST)

test-slow: $(STAMP)  ## the tests that train a model
	$(PYTEST) -m 'slow and not gpu'

test-gpu: $(STAMP)  ## the tests that need a CUDA device, and a torch that knows it
	$(PY) -m pytest -m gpu

lint: $(STAMP)  ## ruff and mypy --strict alone
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict kvedit

format: $(STAMP)  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(STAMP)  ## write the generated pages again, and store/schema.sql
	$(PY) -m tests.docs.cli_page docs/cli.md
	$(PY) -m tests.docs.config_page docs/configuration.md
	$(PY) -m tests.docs.results
	$(PY) -c 'from kvedit.store.migrations import schema_sql as s; print(s(), end="")' > store/.schema.sql
	mv store/.schema.sql store/schema.sql

picture: $(STAMP)  ## run the commands of the README's picture and draw it again
	$(PY) -m tests.docs.picture

$(SITE_STAMP): docs/requirements.lock
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --retries 1 -r docs/requirements.lock
	touch $@

# Copied with the folders that links between pages expect, so the same links hold on GitHub.
site: $(SITE_STAMP)  ## build the documentation into site/, every link checked
	rm -rf $(PAGES) site
	mkdir -p $(PAGES)/store $(PAGES)/kvedit/data/kvedit-tiny
	cp -r README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md LICENSE docs $(PAGES)
	cp store/README.md store/schema.sql $(PAGES)/store
	cp kvedit/data/kvedit-tiny/README.md $(PAGES)/kvedit/data/kvedit-tiny
	.venv-docs/bin/python -m mkdocs build --strict --config-file docs/mkdocs.yml

clean:  ## remove the environment, caches and builds; never the store
	rm -rf .venv .venv-docs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site
	find kvedit tests -name __pycache__ -type d -prune -exec rm -rf {} +
