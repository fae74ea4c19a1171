# Everything runs in .venv, made on first use. Variants: `make demo CONSTRAINTS=` takes PyTorch's CUDA build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= infra/constraints/cpu.txt
DEMO_OUT ?= out/demo
# make gpu: seconds for everything, folder for the results, and what else its --help explains. Its Python is the machine's own,
# the one that has PyTorch for CUDA: nothing is taken from a network.
GPU_PYTHON ?= python3
BUDGET ?= 540
GPU_OUT ?= benchmarks/gpu
GPU_QUEUE = PYTHONPATH=infra/typing$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m millijoule.jobs.gpu.queue
GPU_PLATFORMS := $(foreach n,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014,--platform $(n)_x86_64)
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test lint chaos slow accelerator gpu gpu-list gpu-rehearsal gpu-wheels bench install clean help

help:
	@echo "make demo   install, make images from infra/demo_prompts.txt into $(DEMO_OUT)"
	@echo "make test   install, run lint, types and the whole test suite"
	@echo "make chaos  only the tests that kill processes"
	@echo "make slow   the long tests that make test leaves out"
	@echo "make accelerator  the tests that need an NVIDIA GPU"
	@echo "make gpu    what waits for an NVIDIA GPU, within BUDGET=$(BUDGET) seconds, into GPU_OUT=$(GPU_OUT); again to go on"
	@echo "            WHEELS=folder of carried wheels, STEPS='names', GPU_ARCHIVE=prefix; gpu-list, gpu-rehearsal, gpu-wheels"
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

gpu:
	$(GPU_QUEUE) --budget $(BUDGET) --out $(GPU_OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(STEPS),--steps $(STEPS)) \
	  $(if $(GPU_ARCHIVE),--archive $(GPU_ARCHIVE))

gpu-list:
	$(GPU_QUEUE) --list --out $(GPU_OUT)

gpu-rehearsal: $(VENV)/installed-test
	$(BIN)/python -m millijoule.jobs.gpu.queue --rehearse --budget $(BUDGET) $(if $(STEPS),--steps $(STEPS))

# for a machine with Python 3.12 and no network; see benchmarks/gpu-queue.md
gpu-wheels: $(VENV)/installed-run
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(GPU_PLATFORMS) -d $(or $(WHEELS),wheels) -r infra/gpu-wheels.txt

bench: $(VENV)/installed-test
	$(BIN)/millijoule bench pipeline --output benchmarks/pipeline

clean:
	rm -rf $(VENV) out build dist *.egg-info
