# On a fresh Debian 12: `make run` runs the register suite on this machine's KVM, `make test` the project's own tests.
# Both make .venv/ first, from the lock file, and install what is missing through apt where they may.

VENV := .venv
PYTHON ?= /usr/bin/python3
STAMP := $(VENV)/.stamp

USABLE_KVM = $(VENV)/bin/python -c 'from harness.vm import Kvm; Kvm().close()' 2>/dev/null

.PHONY: run test test-lab test-nested check bench bench-lab bench-series nightly demo-series lab-packages clean
run: $(STAMP)
	@if $(USABLE_KVM); then \
	    $(VENV)/bin/kvm-harness run $(ARGS); \
	else \
	    $(VENV)/bin/kvm-harness probe > /dev/null || :; \
	    echo "so the suite runs nested, on Debian's newest kernel in QEMU (the first time builds it: 10 to 15 minutes)"; \
	    echo "each access path once; all of it: make run ARGS='--tier full'"; \
	    sh ci/packages.sh lab && $(VENV)/bin/kvm-harness lab run --tier smoke $(ARGS); \
	fi

test: $(STAMP) lab-packages check
	@$(VENV)/bin/python -m pytest tests/unit
	@if $(USABLE_KVM); then \
	    $(VENV)/bin/python -m pytest -n 2 tests/kvm; \
	else \
	    echo "no usable /dev/kvm: the tests in tests/kvm are not run; the suite's smoke tier is, nested in QEMU"; \
	    $(MAKE) test-nested; \
	fi

# Tests that compile kernels: by themselves, `.venv/bin/python -m pytest tests/lab/test_...`
COMPILING := $(foreach name,kbuild apx_kvm same_code series_kernels,--ignore=tests/lab/test_$(name).py)

# The lab: its own tests, and the suite's smoke tier on a stock kernel. Builds our QEMU the first time.
test-lab: $(STAMP) lab-packages
	$(VENV)/bin/python -m pytest tests/lab $(COMPILING)

# The least of it: one nested run on a stock kernel.
test-nested: $(STAMP) lab-packages
	$(VENV)/bin/python -m pytest tests/lab/test_lab_run.py -k smoke

# Every configuration on every stock kernel, those with APX on a kernel of our own: one table; a journal, JUnit and KTAP
# for each cell. Before that the emulated processor against the model, a thousand states for every form of instruction.
nightly: $(STAMP) lab-packages
	@bad=0; \
	KVM_HARNESS_TEMPLATE_STATES=1000 $(VENV)/bin/python -m pytest -q tests/lab/test_apx_templates.py || bad=1; \
	$(VENV)/bin/kvm-harness lab run --config all --debian 6.1,6.12,7.3 $(ARGS) || bad=1; \
	$(VENV)/bin/python ci/qemu/demo_series.py --out out/demo-series || bad=1; \
	exit $$bad

# A patch series whose verdicts are known beforehand, through `kvm-harness series`. Compiles a kernel, and six times a part.
demo-series: $(STAMP) lab-packages
	$(VENV)/bin/python ci/qemu/demo_series.py --out out/demo-series

lab-packages:
	sh ci/packages.sh lab

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(VENV)/bin/python bench/run.py

# What the lab costs. The first time builds a kernel, some minutes.
bench-lab: $(STAMP) lab-packages
	$(VENV)/bin/python bench/lab.py $(ARGS)

# A series of twenty patches, half of them renames: how long, and how much of it is compiling.
bench-series: $(STAMP) lab-packages
	$(VENV)/bin/python bench/series.py $(ARGS)

$(STAMP): requirements.lock pyproject.toml ci/packages.sh bin/kvm-harness
	sh ci/packages.sh
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
