# make test     everything that needs no GPU: static checks, kernels compiled for GPUs without one, the CPU tests
# make test-gpu the tests that need a GPU
# make sanitize compute-sanitizer over some of these
# make docs     the site, in build/site
# make mutants  every seeded bug must make a test fail; make test tries some. ARGS="--record benchmarks/results/mutants.json" writes it down
#
# Everything runs in .venv, made on first use. An environment that has all it needs already: make test-gpu PYTHON=python3

PYTHON ?=
JOBS   ?= 2
ARGS   ?=
# the Tritons that the kernels must compile with: everything with the oldest, with the newest each kernel, target and option once
OLDEST ?= 3.6.0
NEWEST ?= 3.9.0

ifeq ($(strip $(PYTHON)),)
PY    := .venv/bin/python
READY := .venv/.dev
LEAN  := .venv/.train
SITE  := .venv/.docs
else
PY    := $(PYTHON)
READY :=
LEAN  :=
SITE  :=
endif

.PHONY: venv train test check bench test-gpu sanitize mutants compile-check docs

venv: $(READY)

# .train holds what training needs, .dev the tools besides; without a GPU a torch build that needs none, named first: or pip
# downloads the newest torch before it reads on. Modules are compiled when they are imported: most of what pip brings never is
CPU_PAIR := $(shell sed -n 's/^cpu = //p' pyproject.toml | grep -o '[a-z]\+==[0-9.]\+')
.venv/.%: pyproject.toml
	test -x .venv/bin/python || python3 -m venv .venv
	if test -e /dev/nvidia0; then wanted=".[$*]"; else wanted=".[cpu,$*] $(CPU_PAIR)"; fi; \
	.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -e $$wanted
	touch $@

train: $(LEAN)
	$(PY) -m distflash train $(ARGS)

test: $(READY)
	$(MAKE) --jobs 2 check compile-check
	$(PY) -m pytest -m "not gpu" -n $(JOBS) $(ARGS)

test-gpu: $(READY)
	$(PY) -m pytest -m gpu $(ARGS)

sanitize: $(READY)
	$(PY) -m tests.gpu.sanitize $(ARGS)

mutants: $(READY)
	$(PY) tests/mutants.py $(ARGS)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"
	$(PY) -c "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command as lint; lint()"
	test -f distflash/py.typed

compile-check: $(READY) .venvs/triton-$(OLDEST)/.stamp .venvs/triton-$(NEWEST)/.stamp
	PYTHONPATH=.venvs/triton-$(OLDEST) $(PY) -m distflash.kernels.compile_check
	PYTHONPATH=.venvs/triton-$(OLDEST) $(PY) -m distflash.kernels.hopper.check
	PYTHONPATH=.venvs/triton-$(NEWEST) $(PY) -m distflash.kernels.compile_check --dtype bf16 --head-dim 128
	PYTHONPATH=.venvs/triton-$(NEWEST) $(PY) -m distflash.kernels.hopper.check

.venvs/triton-%/.stamp: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venvs/triton-$* triton==$*
	touch $@

bench: $(READY)
	$(PY) -m benchmarks $(ARGS)

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
