# Every target works on a fresh machine with Python >= 3.11, where it names no other; `make` alone
# lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/small.yaml
GALLERY ?= gallery
# What is trained, benchmarked and studied on: a folder with a training set and .bin files.
SPHEREFACE2_DATA ?= $(realpath ../shared/data)
export SPHEREFACE2_DATA
FETCHED := runs/data

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow check check-oldest bench gpu serve demo box report docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## create .venv and install the package with its tools

train: install  ## train SphereFace2 and report its accuracy (CONFIG=configs/small.yaml)
ifeq ($(SPHEREFACE2_DATA),)
	@test -d $(FETCHED)/faces || $(BIN)/sphereface2 data fetch lfw $(FETCHED)/faces || \
	    $(BIN)/sphereface2 data fetch drawn $(FETCHED)/faces
	SPHEREFACE2_DATA=$(FETCHED)/faces $(BIN)/sphereface2 fit --config $(CONFIG) --ranks auto
else
	$(BIN)/sphereface2 fit --config $(CONFIG) --ranks auto
endif

# By the names of the files, not by their numbers of tests: tests/unit, of short files, comes last,
# and no worker is left alone with a long one.
test: install  ## run the tests
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: install  ## run the tests that take minutes
	$(BIN)/pip install --quiet --editable '.[examples]'
	$(BIN)/pytest -m slow --timeout 1800

check: install  ## lint, format, types, direction of imports, declared packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# Benchmarks are scripts that nothing tests: their calls must fit the functions.
	! MYPYPATH=src $(BIN)/mypy --scripts-are-modules --explicit-package-bases \
	    benchmarks/*.py benchmarks/*/*.py | grep -E 'call-arg|name-defined|syntax'
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/deptry src

# The override is for kubeflow-trainer-api, a test's tool that asks for a newer pydantic.
OLDEST := build/oldest
OLDEST_TESTS ?= $(patsubst %,tests/unit/test_%.py,cli config heads heads_sphereface2 backbones \
    training_step optim muon checkpoint export verification calibration study_report plots) \
    $(patsubst %,tests/integration/test_%.py,fit gallery serve_api)
check-oldest:  ## run tests with the oldest versions of dependencies (Python 3.11 or 3.12)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet uv
	$(OLDEST)/bin/uv pip compile --quiet --python $(OLDEST) --upgrade --resolution lowest-direct \
	    --extra all --output-file $(OLDEST)/oldest.txt pyproject.toml
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --override $(OLDEST)/oldest.txt \
	    --editable '.[test]'
	$(OLDEST)/bin/pytest -n auto --dist loadfile $(OLDEST_TESTS)

bench: install  ## measure every performance claim
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

gpu: install  ## test and measure on a GPU, nine minutes (ARGUMENTS='--parts tests,heads')
	$(BIN)/python benchmarks/gpu/run.py $(ARGUMENTS)

serve: install  ## serve a model and a gallery on 127.0.0.1:8000 (MODEL=runs/NAME GALLERY=gallery)
	$(BIN)/sphereface2 serve $(or $(MODEL),$(error give MODEL=runs/NAME)) --gallery $(GALLERY)

demo: install  ## open the web page on the model that comes with the package
	@mkdir -p runs && echo "open http://127.0.0.1:8000"
	$(BIN)/sphereface2 serve --gallery runs/demo.db

BOX := runs/box
box: install  ## make the model that comes with the package anew, with dlib's network as teacher
	$(BIN)/pip install --quiet --editable '.[teacher-dlib]'
	$(BIN)/python benchmarks/box/dlib_network.py $(BOX)/dlib
	$(BIN)/sphereface2 fit --config box --teacher $(BOX)/dlib --run-folder $(BOX)/first --ranks auto
	$(BIN)/python benchmarks/box/mapped.py $(BOX)/first $(SPHEREFACE2_DATA)/celeb50k $(BOX)/mapped.npz
	$(BIN)/sphereface2 fit --config box_tune --start-from $(BOX)/first --teacher $(BOX)/mapped.npz --run-folder $(BOX)/run --ranks auto
	$(BIN)/python benchmarks/box/pack.py $(BOX)/first $(BOX)/run $(SPHEREFACE2_DATA)/celeb50k

report: install  ## rebuild reports/ from the published cells of the studies
	@mkdir -p runs/study
	tar --skip-old-files -xJf reports/cells.tar.xz -C runs/study
	$(BIN)/sphereface2 study report configs/study/*.yaml --cells runs/study --out reports

docs: install  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove what the other targets made, except trained runs
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
