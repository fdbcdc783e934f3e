# Each target makes .venv when it is missing; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Byte code is kept even where the environment says no: without it every start costs seconds more.
export PYTHONDONTWRITEBYTECODE :=
# uv takes a third of the time; pip also knows of package indexes that only its own settings name.
define install
$(RUN) -m pip install --quiet --disable-pip-version-check uv
$(VENV)/bin/uv pip install --quiet --python $(RUN) -e '$(1)' || \
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -e '$(1)'
touch $@
endef

API := $(addprefix lpcam.,explain.explainer explain.feature_layers explain.views explain.export \
	prototypes.prototype_set prototypes.head prototypes.kmeans prototypes.centers \
	prototypes.selection visualize functional evaluation models.backbones models.host)

.PHONY: help demo test test-all bench lint format docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/installed ## train, map and score on the embedded data; ends with a table and a report
	$(RUN) train.py hydra.run.dir=outputs/demo/train
	$(RUN) infer.py hydra.run.dir=outputs/demo/infer

# In the order of the files: the long ones lie in the middle, so that no core waits at the end.
test: $(VENV)/installed-dev ## run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/installed-dev ## run the tests and those that take long
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

# On a machine that does nothing else; with SWEEP=1 the sweep too, which takes longest.
bench: $(VENV)/installed-bench ## measure speed and memory beside other packages, in experiments/benchmarks
	$(RUN) -m experiments.benchmarks $(if $(SWEEP),--sweep) $(BENCH)

lint: $(VENV)/installed-dev ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed-dev ## fix style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/installed-dev ## make pages of the library from its docstrings, in build/docs
	$(RUN) -W error::UserWarning \
		-W "ignore:Failed to run TYPE_CHECKING code while parsing Pydantic" \
		-W "ignore:Error parsing type annotation Pydantic" \
		-m pdoc --docformat google --output-directory build/docs $(API)

clean: ## remove what runs left: results, the stage store, the generated data and pages
	rm -rf outputs build store data .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(call install,.)

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(call install,.[dev])
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) -e '.[crf]' || \
		echo "no dense CRF without a C compiler: its tests are skipped"

$(VENV)/installed-bench: pyproject.toml | $(VENV)/bin/python
	$(call install,.[bench])
