# Two commands do everything on a machine with Python >= 3.11, make and a package index:
#   make demo                      install, index the sample photos, search them three ways
#   make demo PHOTOS=~/Pictures    the same with your own photos
#   make test                      lint, types, tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
E5V := $(BIN)/e5v-search
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# faiss-cpu and faiss-gpu own the same folder: exactly one of them
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu)
EXTRA := $(if $(GPU),gpu,cpu)
# milvus-lite brings faiss-cpu
LITE := $(if $(GPU),,$(shell echo ,milvus-lite))

SAMPLES := e5v_search/samples
PHOTOS ?= $(SAMPLES)
ifeq ($(PHOTOS),$(SAMPLES))
DEMO := demo/samples
QUERY ?= a rocket in the night sky
REFERENCE ?= $(SAMPLES)/drawn-two-orange-rings.png
CHANGE ?= show three instead
else
DEMO := demo/photos
QUERY ?= a dog
REFERENCE ?= $$(cat demo/best)
CHANGE ?= in the snow
endif

.PHONY: demo test lint types check clean help

help:
	@sed -n '1,4s/^# //p' Makefile

# On a machine without a GPU the CPU build of torch is tried first: the plain wheel brings gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "e5v-search needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), which takes a minute or two …"
	@$(if $(GPU),,$(PIP) "torch==$(TORCH)+cpu" 2>/dev/null || )$(PIP) "torch==$(TORCH)"
	@$(PIP) -e ".[$(EXTRA)]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) -e ".[$(EXTRA),dev$(LITE)]"
	@touch $@

# each command is shown as one would type it, then run
define show
	@printf '\n$$ e5v-search %s\n' '$(1)'
	@$(E5V) $(1) || [ $$? -eq 1 ]  # 1: done, though some files could not be used
endef

demo: $(VENV)/installed
	$(call show,index "$(PHOTOS)" -c $(DEMO))
	$(call show,search "$(QUERY)" -c $(DEMO) -k 5 --sheet demo/text.jpg)
	@$(E5V) search "$(QUERY)" -c $(DEMO) -k 1 --paths > demo/best
	$(call show,search --image "$$(cat demo/best)" -c $(DEMO) -k 5 --sheet demo/image.jpg)
	$(call show,search --image "$(REFERENCE)" --modify "$(CHANGE)" -c $(DEMO) -k 5 --sheet demo/composed.jpg)
	@printf '\nThe same results as pictures: demo/text.jpg, demo/image.jpg, demo/composed.jpg\n'
	@printf 'Ask for something else: $(E5V) search "what you are looking for" -c $(DEMO)\n'

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# two files of tests at a time, each on one core
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
