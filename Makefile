# Two commands for a newcomer: `make quickstart` and `make test`. Both need Python 3.11+ and a package index, no more.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test torture lock audit lint types install clean

quickstart: $(VENV)/.installed
	$(BIN)/cpdiff run quickstart

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

KILLS ?= 100
torture: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/torture.py --kills $(KILLS)

# One file for Python 3.11 and newer on every platform, with the hashes of the files on PyPI.
lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra dask --extra s3 \
		--no-header --output-file requirements.lock pyproject.toml

# Known vulnerabilities of the locked packages, and, counted, those that could not be looked up.
audit: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pip-audit
	-$(BIN)/pip-audit --strict --require-hashes --disable-pip -r requirements.lock
	$(BIN)/pip-audit --require-hashes --disable-pip -r requirements.lock -f json | $(BIN)/python -c 'import json, sys; \
		found = json.load(sys.stdin)["dependencies"]; skipped = [item for item in found if "skip_reason" in item]; \
		print(len(found) - len(skipped), "packages audited,", len(skipped), "not audited")'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

install: $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
