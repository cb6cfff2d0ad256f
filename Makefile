# On a fresh Debian 12: `make run` runs the register suite on this machine's KVM, `make test` the project's own tests.
# Both make .venv/ first, from the lock file, and install what is missing through apt where they may.

VENV := .venv
PYTHON ?= /usr/bin/python3
STAMP := $(VENV)/.stamp

.PHONY: run test check bench clean
run: $(STAMP)
	$(VENV)/bin/kvm-harness run

test: $(STAMP) check
	@$(VENV)/bin/python -m pytest tests/unit
	@if $(VENV)/bin/python -c 'from harness.vm import Kvm; Kvm().close()' 2>/dev/null; then \
	    $(VENV)/bin/python -m pytest -n 2 tests/kvm; \
	else \
	    echo "no usable /dev/kvm: the tests in tests/kvm were not run"; \
	fi

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(VENV)/bin/python bench/run.py

$(STAMP): requirements.lock pyproject.toml ci/packages.sh
	sh ci/packages.sh
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
