# make demo   builds the environment, prepares text, trains on two Horovod ranks, shows what came of it
# make test   builds the environment, runs every test
# make bench  measures speed side by side with other ways (an hour or two; BENCH=name runs one). By name only, as they
#             take long: chaos (TRIALS=200), finetune, large_batch, memory, multi30k, prediction, proposal, requeue, summaries
# make gpu    builds the environment, tests and measures this machine's NVIDIA GPU in 8 minutes
# make wheels downloads what `WHEELS=wheels make env` builds an environment from where there is no network
# TORCH=..., PYTHON=..., VENV=..., see make-env.sh

VENV ?= .venv
RANKS ?= 2
BENCH ?= $(filter-out gpu gpu_kernels table compare axis tensor pipeline zero chaos finetune large_batch large_batch_report memory multi30k prediction proposal requeue running summaries,$(basename $(notdir $(wildcard tests/bench/*.py))))
# Not PYTHON, which is the user's: the interpreter that the environment is made from.
VENV_PYTHON := $(abspath $(VENV))/bin/python
# horovodrun looks for mpirun on the PATH; mpirun refuses to work for root (as in a container) without being told to.
export PATH := $(abspath $(VENV))/bin:$(PATH)
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: env wheels demo test lint bench gpu clean-demo

env:
	@VENV=$(VENV) ./make-env.sh

wheels:
	@./make-env.sh wheels

# The corpus is what every machine with Python has: its standard library.
demo: env
	@stdlib=$$($(VENV_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') && \
	input="--input $$stdlib --glob *.py --exclude test tests site-packages dist-packages" && set -f && \
	$(VENV_PYTHON) -m data_prep tokenizer $$input --vocab-size 4096 --out data/demo-tokenizer.json && \
	$(VENV_PYTHON) -m data_prep text $$input --tokenizer data/demo-tokenizer.json --val-fraction 0.05 --out data/demo
	horovodrun -np $(RANKS) $(VENV_PYTHON) -m hvdtrain train demo
	@echo && $(VENV_PYTHON) -m hvdtrain evaluate runs/demo
	@echo && $(VENV_PYTHON) -m hvdtrain generate runs/demo --prompt 'def ' --max-tokens 150 --top-p 0.9
	@echo && $(VENV_PYTHON) -m hvdtrain report runs/demo

clean-demo:
	rm -rf runs/demo data/demo data/demo-tokenizer.json data/demo-tokenizer.record.json

# Compiled once, and not by each of hundreds of processes where PYTHONDONTWRITEBYTECODE is set, as in many containers;
# the tests too, which pytest rewrites: by three processes, and then by one to four ranks.
test: export PYTHONDONTWRITEBYTECODE :=
test: env
	$(VENV_PYTHON) -m compileall -q hvdtrain data_prep
	$(VENV_PYTHON) -m pytest tests -n 3
	@$(MAKE) --no-print-directory -j3 $(if $(filter output-sync,$(.FEATURES)),-O) test-mpi-4 test-mpi-2 test-mpi-1

# All three at once, in three quarters of the time: ranks that wait for one another leave the processors to the others.
test-mpi-%: env
	mpirun -np $* --oversubscribe --bind-to none $(VENV_PYTHON) -m pytest tests/mpi </dev/null

lint: env
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

# All of it takes 8 minutes at most, building Horovod included; what was measured by then counts.
gpu:
	@nvidia-smi -L 2>/dev/null | grep -q '^GPU' || { \
	    echo "make gpu: no NVIDIA GPU answers here (nvidia-smi -L); run it on a node that has one" >&2; exit 2; }
	@began=$$(date +%s) && $(MAKE) --no-print-directory env && BEGAN=$$began $(VENV_PYTHON) tests/bench/gpu.py

bench: env
	@set -e; for name in $(BENCH); do echo "== $$name"; $(VENV_PYTHON) tests/bench/$$name.py; done
