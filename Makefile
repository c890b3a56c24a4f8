# make test     everything that needs no GPU: static checks, kernels compiled for GPUs without one, the CPU tests
# make test-gpu the tests that need a GPU
#
# Everything runs in .venv, made on first use. An environment that has all it needs already: make test-gpu PYTHON=python3

PYTHON ?=
JOBS   ?= 2
ARGS   ?=
# oldest and newest Triton that the kernels must compile with; the tests compile them with the installed one
TRITONS ?= 3.6.0 3.9.0

ifeq ($(strip $(PYTHON)),)
PY    := .venv/bin/python
READY := .venv/.dev
LEAN  := .venv/.train
else
PY    := $(PYTHON)
READY :=
LEAN  :=
endif

.PHONY: venv train test check bench test-gpu compile-check
.NOTPARALLEL:

venv: $(READY)

# .train holds what training needs, .dev the tools besides; without a GPU a torch build that needs none
.venv/.%: pyproject.toml
	test -x .venv/bin/python || python3 -m venv .venv
	if test -e /dev/nvidia0; then extras=$*; else extras=cpu,$*; fi; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$$extras]"
	touch $@

train: $(LEAN)
	$(PY) -m distflash train $(ARGS)

test: check compile-check
	$(PY) -m pytest -m "not gpu" -n $(JOBS) $(ARGS)

test-gpu: $(READY)
	$(PY) -m pytest -m gpu $(ARGS)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"
	$(PY) -c "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command as lint; lint()"
	test -f distflash/py.typed

compile-check: $(READY) $(TRITONS:%=.venvs/triton-%/.stamp)
	for version in $(TRITONS); do \
	  echo "with triton $$version:"; export PYTHONPATH=.venvs/triton-$$version; \
	  $(PY) -m distflash.kernels.compile_check && $(PY) -m distflash.kernels.hopper.check || exit 1; \
	done

.venvs/triton-%/.stamp: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venvs/triton-$* triton==$*
	touch $@

bench: $(READY)
	$(PY) -m benchmarks $(ARGS)
