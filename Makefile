# make demo | test | lint | docs | bench | soak | run: each sets up what it needs, in .venv.
# make bench BENCH='--quick --only cpu' takes the options of python -m bench.
PYTHON ?= python3
BIN := .venv/bin
# An editable install warns of folders that have the package's name: there are none.
PIP := PYTHONWARNINGS=ignore $(BIN)/pip

.PHONY: demo run test lint docs bench soak clean

demo: .venv/.run  ## the built-in provider and gunicorn, and what to type
	@$(BIN)/python examples/demo.py

run: .venv/.run  ## the real provider
	@if [ -z "$$CHATSTREAM_API_KEY$$DEEPSEEK_API_KEY$$CHATSTREAM_UPSTREAM_URL" ]; then \
		echo "Set DEEPSEEK_API_KEY to your DeepSeek key (or CHATSTREAM_UPSTREAM_URL and CHATSTREAM_API_KEY for another provider), then: make run" >&2; \
		exit 2; \
	fi
	@[ "$$CHATSTREAM_PAGE" = off ] || echo "The page: http://$${CHATSTREAM_BIND:-127.0.0.1:8000}$${CHATSTREAM_PAGE:-/}"
	@$(BIN)/gunicorn wsgi:app

# All tests; `pytest` alone runs the quick ones. Four processes on two cores, since most tests wait.
# In the order the files are found: the quick tests, which are many in a file, fill up the end.
test: .venv/.dev tests/node/node_modules/.package-lock.json
	$(BIN)/python -m pytest -m "" --numprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet: MkDocs would count no warnings then.
docs: .venv/.dev  ## the pages as a site, in site/
	$(BIN)/python -m docs.hooks.settings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/.bench  ## ours and the peers that can be had here; bench/RESULTS.md, docs/charts
	$(BIN)/python -m bench $(BENCH)

SECONDS ?= 60
soak: .venv/.dev  ## chaos for SECONDS, from SEED on, and a table
	@$(BIN)/python -m tests.integration.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf site .venv .venv-litellm bench/peers/vercel/node_modules tests/node/node_modules

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/.run: .venv/bin/python pyproject.toml requirements.txt
	$(PIP) install --quiet --requirement requirements.txt --editable .
	@touch $@

# A peer that cannot be had is left out of the comparison, with a line. LiteLLM pins what we use too.
.venv/.bench: .venv/.dev pyproject.toml bench/peers/vercel/package.json
	$(PIP) install --quiet --editable '.[bench]'
	-$(PYTHON) -m venv .venv-litellm && .venv-litellm/bin/pip install --quiet 'litellm[proxy]'
	-cd bench/peers/vercel && npm install --silent --no-audit --no-fund --no-package-lock
	@touch $@

.venv/.dev: .venv/.run pyproject.toml requirements-dev.txt
	$(PIP) install --quiet --requirement requirements-dev.txt
	@touch $@

# Without npm, and where a package cannot be had, the tests that need it are skipped; in CI they fail.
tests/node/node_modules/.package-lock.json: tests/node/package.json
	-cd tests/node && npm install --silent --no-audit --no-fund --no-package-lock && touch node_modules/.package-lock.json
