# Everything runs in .venv, made on first use. Variants: `make demo CONSTRAINTS=` takes PyTorch's CUDA build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= infra/constraints/cpu.txt
DEMO_OUT ?= out/demo
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test lint chaos slow accelerator bench install clean help

help:
	@echo "make demo   install, make images from infra/demo_prompts.txt into $(DEMO_OUT)"
	@echo "make test   install, run lint, types and the whole test suite"
	@echo "make chaos  only the tests that kill processes"
	@echo "make slow   the long tests that make test leaves out"
	@echo "make accelerator  the tests that need an NVIDIA GPU"
	@echo "make bench  measure the pipeline, write benchmarks/pipeline/"

$(VENV)/installed-run: pyproject.toml $(wildcard infra/constraints/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed-run
	$(BIN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e ".[test,train,diffusers,report,verify]"
	touch $@

install: $(VENV)/installed-run

demo: install
	$(BIN)/millijoule generate --prompts infra/demo_prompts.txt --output $(DEMO_OUT) --format files
	@echo "images: $(DEMO_OUT)/data   table: $(DEMO_OUT)/manifest.parquet   energy: $(DEMO_OUT)/energy"

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -m "not slow" tests

chaos: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m "not slow" tests/chaos

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m slow tests

accelerator: $(VENV)/installed-test
	$(BIN)/python -m pytest -q --noconftest tests/accelerator

bench: $(VENV)/installed-test
	$(BIN)/millijoule bench pipeline --output benchmarks/pipeline

clean:
	rm -rf $(VENV) out build dist *.egg-info
