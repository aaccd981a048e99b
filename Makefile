# Commands, each of which sets itself up in .venv and nowhere else:
#   make demo   a first run: builds a tiny world, trains on it, shows what happened
#   make test   the tests; `make test-all` with the rest, as docs/contributing.md says
#   make study  ε-DPO, DPO, β-DPO and TR-DPO on a world with a known true reward
#   make bench  head, training runs, balance and data, measured; writes benchmarks/RESULTS.md
#   make lint   what pre-commit checks
#   make docs   the site of README.md and docs/, into build/site; checks its links
# And with the Python that is there, in .venv or not, so that a machine without network
# and with a GPU can run it; results are in build/gpu:
#   make gpu         all that is to be measured on a GPU, within BUDGET seconds
#   make gpu-wheels  before that, elsewhere: what such a machine lacks, into
#                    build/gpu-wheels, which travels with the working tree

# What .venv is made with; without it, the first of Python 3.12, 3.13 and 3.11 that is
# found (tools/find-python).
PYTHON ?=
VENV := .venv
PATH_OUTSIDE := $(PATH)
export PATH := $(abspath $(VENV))/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK ?= 1

# A release that axolotl 0.19, 0.20 and 0.21 take; installed first, so that pip looks no
# further. Set TORCH to another one, or to the path or URL of a wheel.
TORCH ?= torch==2.13.0

.PHONY: demo docs study test test-all test-rest bench gpu gpu-wheels lint clean venv

venv:
	@PATH="$(PATH_OUTSIDE)" tools/make-venv $(VENV) "$(PYTHON)"

# axolotl wants exactly this release. On Python 3.13 pip has to build it, and what it
# would fetch for that does not run there; with the setuptools that is there it builds.
ZSTANDARD := zstandard==0.22.0

PIP := python -m pip --disable-pip-version-check install
SO_FAR = echo "$$(du -sh $(VENV) | cut -f1)B in $(VENV)"

$(VENV)/installed-torch: | venv
	@echo "Installing $(TORCH), then axolotl, with $$(python -V): in all 4.5 GB in $(VENV)" \
		"with a CPU build of torch, 7 GB with a CUDA build, and some minutes."
	$(PIP) "$(TORCH)"
	@python -W ignore -c 'import torch; print("This is torch", torch.__version__, end=": ")'
	@$(SO_FAR)
	$(PIP) -q --no-build-isolation $(ZSTANDARD)
	@touch $@

$(VENV)/installed-%: pyproject.toml $(VENV)/installed-torch | venv
	$(PIP) -q -e ".$(if $(filter-out package,$*),[$*])"
	@$(SO_FAR)
	@touch $@

demo: $(VENV)/installed-package
	python examples/tiny/build.py
	axolotl train examples/tiny_edpo.yml --launcher python
	axolotl edpo-report examples/tiny/out
	python examples/tiny/report.py

study: $(VENV)/installed-package
	python examples/study/run.py

# Two processes of one thread each. The tests of a file run in one of them.
WORKERS ?= 2
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	--durations 12 --durations-min 5

test: $(VENV)/installed-test
	$(PYTEST) -m "not rest"

test-all: test test-rest

# What `make test` leaves out.
test-rest: $(VENV)/installed-test
	$(PYTEST) -m rest

# A small model whose head is a small part of the work, as in large models.
BODY := --vocab 4096 --hidden 512 --layers 12 --pairs 96
PATHS := --contenders shared,cached,traced,batch_margin --baseline shared --repeats 2

# DATA: preference pairs in JSON lines to train on; without it synthetic ones.
DATA ?=

bench: $(VENV)/installed-test
	python benchmarks/head.py --write
	python benchmarks/train_step.py $(addprefix --data ,$(DATA)) --write
	python benchmarks/parts.py $(addprefix --data ,$(DATA)) --write
	for adapter in "" "--adapter lora"; do python benchmarks/train_step.py \
		$(addprefix --data ,$(DATA)) $(BODY) $(PATHS) $$adapter --write || exit; done
	python benchmarks/train_step.py $(addprefix --data ,$(DATA)) $(BODY) --repeats 2 \
		--contenders reference-free --baseline fixed --write
	python benchmarks/balance.py $(addprefix --data ,$(DATA)) --write
	python benchmarks/prepare.py $(addprefix --data ,$(DATA)) --write

BUDGET ?= 400
OUT ?= build/gpu
# Sections, comma-separated; without it all of them.
ONLY ?=

gpu:
	python3 benchmarks/gpu.py --out "$(OUT)" --budget $(BUDGET) $(addprefix --only ,$(ONLY))

gpu-wheels:
	"$$(tools/find-python 3.12)" benchmarks/gpu_wheels.py

# Needs no axolotl: the API is read from the source.
docs: | venv
	$(PIP) -q $$(python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", \
		"rb"))["project"]["optional-dependencies"]["docs"])')
	mkdocs build

lint: $(VENV)/installed-dev
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache

clean:
	rm -rf examples/tiny/build examples/tiny/out
