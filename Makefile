# Commands, each of which sets itself up in .venv and nowhere else:
#   make demo   a first run: builds a tiny world, trains on it, shows what happened
#   make test   the tests
#   make study  ε-DPO, DPO, β-DPO and TR-DPO on a world with a known true reward
#   make bench  head, training runs and balance, measured; writes benchmarks/RESULTS.md
#   make lint   what pre-commit checks

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK ?= 1

# The newest release that axolotl 0.19 takes; installed first, so that pip looks no
# further. Set TORCH to another one for another build.
TORCH ?= torch==2.13.0

.PHONY: demo study test bench lint clean

$(VENV)/installed-%: pyproject.toml
	@echo "Installing into $(VENV): the first time this takes some minutes."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q "$(TORCH)"
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -e ".$(if $(filter-out package,$*),[$*])"
	touch $@

demo: $(VENV)/installed-package
	python examples/tiny/build.py
	axolotl train examples/tiny_edpo.yml --launcher python
	axolotl edpo-report examples/tiny/out
	python examples/tiny/report.py

study: $(VENV)/installed-package
	python examples/study/run.py

test: $(VENV)/installed-test
	python -m pytest

# A small model whose head is a small part of the work, as in large models.
BODY := --vocab 4096 --hidden 512 --layers 12 --pairs 96
PATHS := --contenders shared,cached,traced,batch_margin --baseline shared --repeats 2

# DATA: preference pairs in JSON lines to train on; without it synthetic ones.
DATA ?=

bench: $(VENV)/installed-test
	python benchmarks/head.py --write
	python benchmarks/train_step.py $(addprefix --data ,$(DATA)) --write
	for adapter in "" "--adapter lora"; do python benchmarks/train_step.py \
		$(addprefix --data ,$(DATA)) $(BODY) $(PATHS) $$adapter --write || exit; done
	python benchmarks/balance.py $(addprefix --data ,$(DATA)) --write

lint: $(VENV)/installed-dev
	ruff check .
	ruff format --check .
	mypy

clean:
	rm -rf examples/tiny/build examples/tiny/out
