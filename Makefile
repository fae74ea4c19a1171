# Everything runs in .venv, made on first use. Variants: `make demo CONSTRAINTS=` takes PyTorch's CUDA build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= infra/constraints/cpu.txt
DEMO_OUT ?= out/demo
SBOM ?= out/sbom.json
# make gpu: seconds for everything, folder for the results, and what else its --help explains. Its Python is the machine's own,
# the one that has PyTorch for CUDA: nothing is taken from a network.
GPU_PYTHON ?= python3
BUDGET ?= 540
GPU_OUT ?= benchmarks/gpu
GPU_QUEUE = PYTHONPATH=infra/typing$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m millijoule.jobs.gpu.queue
GPU_PLATFORMS := $(foreach n,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014,--platform $(n)_x86_64)
# make chaos-long: for how long (again: for so long more), the first run's seed, and a folder; what went wrong stays in it.
MINUTES ?= 15
SEED ?= 0
CHAOS_OUT ?= out/chaos
export RAY_USAGE_STATS_ENABLED := 0
# Tests start hundreds of processes: each would compile the same sources anew, and pytest all tests.
unexport PYTHONDONTWRITEBYTECODE
# DeepSpeed is built from source, without its CUDA kernels: seconds, no compiler.
export DS_BUILD_OPS := 0

# What setuptools warns of (folders of data among the packages, the way in which pyproject.toml names the C++ part) is for whoever builds.
QUIETLY := PYTHONWARNINGS=ignore

.PHONY: help demo test test-fast lint chaos chaos-long hosts slow accelerator gpu gpu-list gpu-rehearsal gpu-wheels bench install install-test sbom audit audit-known clean

help:
	@echo "for everybody"
	@echo "  make demo          install, make images from infra/demo_prompts.txt into DEMO_OUT=$(DEMO_OUT)"
	@echo "  make test          install, run lint, types and all tests but the slow ones (what CI runs)"
	@echo "  make install       .venv with what jobs need; CONSTRAINTS= takes PyTorch's CUDA build, PYTHON=$(PYTHON)"
	@echo "  make sbom          what is installed, as CycloneDX, into SBOM=$(SBOM)"
	@echo "  make audit         known flaws of the pins: asks the package index, or ADVISORIES=checkout of pypa/advisory-database;"
	@echo "                     make audit-known (CI) fails on known flaws alone, not on the age of what is known"
	@echo "  make clean         remove .venv and everything that was built"
	@echo "for the inner loop"
	@echo "  make install-test  .venv with everything the tests need"
	@echo "  make test-fast     minutes: no Ray, no servers, no training, no lint"
	@echo "  make lint          formatting, lint, types"
	@echo "  make chaos         a quarter of an hour: the tests that kill processes, 150 storms of faults, one on Ray, into CHAOS_OUT=$(CHAOS_OUT)"
	@echo "  make chaos-long    storms of faults for HOURS=... or MINUTES=$(MINUTES) from SEED=$(SEED) on, into CHAOS_OUT=$(CHAOS_OUT)"
	@echo "  make hosts         tests on several hosts, of namespaces: links cut, power lost (Linux, root)"
	@echo "  make slow          the long tests that make test leaves out"
	@echo "  make bench         measure the pipeline, write benchmarks/pipeline/"
	@echo "with an NVIDIA GPU"
	@echo "  make accelerator   the tests that need one"
	@echo "  make gpu           what waits for one, within BUDGET=$(BUDGET) seconds, into GPU_OUT=$(GPU_OUT); again to go on;"
	@echo "                     WHEELS=folder of carried wheels, STEPS='names', GPU_ARCHIVE=prefix"
	@echo "  make gpu-list      its steps, and what is done;  make gpu-rehearsal tries them on this machine"
	@echo "  make gpu-wheels    download the wheels a machine without network needs, into WHEELS"

$(VENV)/installed-run: pyproject.toml $(wildcard infra/constraints/*.txt kernels/cpp/*.* kernels/cpp/png/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(QUIETLY) $(BIN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed-run
	$(QUIETLY) $(BIN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e ".[test,train,diffusers,report,verify,otel]"
	touch $@

install: $(VENV)/installed-run

install-test: $(VENV)/installed-test

demo: install
	$(BIN)/millijoule generate --prompts infra/demo_prompts.txt --output $(DEMO_OUT) --format files
	@echo "images: $(DEMO_OUT)/data   table: $(DEMO_OUT)/manifest.parquet   energy: $(DEMO_OUT)/energy"

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two at a time: most of what tests of processes do is wait for each other.
# Files in their order: those of minutes, which start clusters, come first and short ones fill the end.
PYTEST = $(BIN)/python -m pytest -q -n $(or $(TEST_PROCESSES),2) --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow" tests

test-fast: $(VENV)/installed-test
	$(PYTEST) -m "not slow and not long and not servers" tests

chaos: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m "not slow" tests/chaos
	rm -rf $(CHAOS_OUT)/seeded
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m support.chaos $(CHAOS_OUT)/seeded --seed 1000 --storms 150 --ray 1 --at-once 2

chaos-long: $(VENV)/installed-test
	PYTHONPATH=tests OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python -m support.chaos $(CHAOS_OUT) --seed $(SEED) --at-once 2 \
	  $(if $(HOURS),--hours $(HOURS),--minutes $(MINUTES)) --record $(CHAOS_OUT)/storms.json

hosts: $(VENV)/installed-test
	$(BIN)/python -m pytest -q tests/hosts

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
	$(BIN)/python -m pip wheel --quiet --no-deps -w $(or $(WHEELS),wheels) $(addprefix -c ,$(CONSTRAINTS)) deepspeed

# Tools of their own environment, so that they are no part of what they list.
TOOLS := $(VENV)/tools
$(TOOLS)/installed: Makefile
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

sbom: $(VENV)/installed-run $(TOOLS)/installed
	mkdir -p $(dir $(SBOM))
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o $(SBOM) $(BIN)/python

# The package index where it knows advisories; else a checkout of pypa/advisory-database in ADVISORIES, else the record of the last
# comparison, which must not be older than a month.
AUDIT = $(BIN)/python infra/audit/audit.py
audit: $(VENV)/installed-run $(TOOLS)/installed
ifdef ADVISORIES
	$(AUDIT) compare $(ADVISORIES) --revision $$(git -C $(ADVISORIES) rev-parse HEAD) --date $$(git -C $(ADVISORIES) log -1 --format=%cs)
else
	$(AUDIT) ask $(TOOLS)/bin/pip-audit || { test $$? -eq 3 && $(AUDIT) state --most-days 31; }
endif

# For CI: fails on what is known, says what nobody could be asked about. The record's age fails `make audit` alone.
audit-known: $(VENV)/installed-run $(TOOLS)/installed
	$(AUDIT) ask $(TOOLS)/bin/pip-audit || test $$? -eq 3

bench: $(VENV)/installed-test
	$(BIN)/millijoule bench pipeline --output benchmarks/pipeline

clean:
	rm -rf $(VENV) out build dist *.egg-info
