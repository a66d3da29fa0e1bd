# make demo   builds the environment, prepares text, trains on two Horovod ranks, shows what came of it
# make test   builds the environment, runs every test
# make bench  measures speed side by side with other ways (an hour or two; BENCH=name runs one). By name only, as they
#             take long: chaos (TRIALS=200), large_batch, requeue
# TORCH=..., VENV=..., see make-env.sh

VENV ?= .venv
RANKS ?= 2
BENCH ?= $(filter-out link table chaos large_batch requeue,$(basename $(notdir $(wildcard tests/bench/*.py))))
PYTHON := $(abspath $(VENV))/bin/python
# horovodrun looks for mpirun on the PATH; mpirun refuses to work for root (as in a container) without being told to.
export PATH := $(abspath $(VENV))/bin:$(PATH)
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: env demo test lint bench clean-demo

env:
	@VENV=$(VENV) ./make-env.sh

# The corpus is what every machine with Python has: its standard library.
demo: env
	@stdlib=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') && \
	input="--input $$stdlib --glob *.py --exclude test tests site-packages dist-packages" && set -f && \
	$(PYTHON) -m data_prep tokenizer $$input --vocab-size 4096 --out data/demo-tokenizer.json && \
	$(PYTHON) -m data_prep text $$input --tokenizer data/demo-tokenizer.json --val-fraction 0.05 --out data/demo
	horovodrun -np $(RANKS) $(PYTHON) -m hvdtrain train demo
	@echo && $(PYTHON) -m hvdtrain evaluate runs/demo
	@echo && $(PYTHON) -m hvdtrain generate runs/demo --prompt 'def ' --max-tokens 150 --top-p 0.9
	@echo && $(PYTHON) -m hvdtrain report runs/demo

clean-demo:
	rm -rf runs/demo data/demo data/demo-tokenizer.json data/demo-tokenizer.record.json

test: env
	$(PYTHON) -m pytest tests
	for ranks in 1 2 4; do \
	    mpirun -np $$ranks --oversubscribe --bind-to none $(PYTHON) -m pytest tests/mpi || exit 1; \
	done

lint: env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: env
	@set -e; for name in $(BENCH); do echo "== $$name"; $(PYTHON) tests/bench/$$name.py; done
