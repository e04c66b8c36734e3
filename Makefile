# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
PIP    := .venv/bin/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS = 1

.PHONY: demo test lint clean

demo: .venv/installed
	.venv/bin/lipcert demo --out demo

test: .venv/installed
	.venv/bin/python -m pytest -n 2

lint: .venv/installed
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv demo
