# Every target makes or refreshes .venv by itself; `make help` lists them.
PYTHON    ?= python3
PROCESSOR ?= cpu
DATA      ?=
SEED      ?= 0
DEVICE    ?= auto
PRECISION ?=
MODEL     ?=
OPTIONS   ?=
RUNS      ?=
SCRIPT    ?=

VENV  := .venv
PY    := $(VENV)/bin/python
# Two stages of .venv: what serving needs, and everything.
SERVE := $(VENV)/.serve-$(PROCESSOR)
READY := $(VENV)/.ready-$(PROCESSOR)

DATA_OPTION  = $(if $(DATA),--data $(DATA))
TRAIN_OPTIONS = --seed $(SEED) --device $(DEVICE) $(if $(PRECISION),--precision $(PRECISION)) --resume $(DATA_OPTION)

# `make train export` is a sequence, whatever -j says.
.NOTPARALLEL:
.PHONY: help demo serve setup data train export evaluate report test test-slow lint format protos wheel bench-training bench-recipes bench-dependability bench-serving soak clean
.DEFAULT_GOAL := help

help: ## list the targets and what can be set
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DATA=cifar10 | FOLDER | synthetic[:N]   the data (default: \$$CIFAR10_DATA, or the official archive, downloaded)"
	@echo "  SEED=0  DEVICE=auto|cpu|cuda  PRECISION=fp32|bf16   of training (default: the recipe's)"
	@echo "  MODEL=exported/model.onnx | runs/RECIPE/SEED | grpc://HOST:PORT   what evaluate measures"
	@echo "  OPTIONS='--port 50051 …'                the server's"
	@echo "  PROCESSOR=cpu|cuda                      which onnxruntime is installed"

demo: $(SERVE) ## serve the shipped model, classify samples/ through gRPC, stop; installs neither torch nor the rest
	$(PY) -m service.demo

serve: $(SERVE) ## serve exported/ on 127.0.0.1:50051 until Ctrl-C; OPTIONS='--help' tells the options
	$(PY) -m service --model exported $(OPTIONS)

setup: $(READY) ## make or refresh .venv

# The two builds of onnxruntime provide the same module and must not meet.
$(SERVE): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	if ls $(VENV)/.serve-* >/dev/null 2>&1 && ! test -e $@; then $(PY) -m pip uninstall -q -y onnxruntime onnxruntime-gpu; fi
	$(PY) -m pip install -q -c constraints.txt -e '.[$(PROCESSOR)]'
	rm -f $(VENV)/.serve-* $(VENV)/.ready-*
	touch $@

$(READY): $(SERVE)
	$(PY) -m pip install -q -c constraints.txt -e '.[$(PROCESSOR),train,dev]'
	touch $@

data: $(READY) ## summary of the data, its statistics, figure 1
	$(PY) -m cifar_core.data $(DATA_OPTION)

train: $(READY) ## train dropout-0.2, deep and deep-fast to the end; goes on where it was stopped, skips what is finished
	$(PY) -m cifar_core.train dropout-0.2 $(TRAIN_OPTIONS)
	$(PY) -m cifar_core.train deep $(TRAIN_OPTIONS)
	$(PY) -m cifar_core.train deep-fast $(TRAIN_OPTIONS)

export: $(READY) ## write the finished run of best validation accuracy to exported/
	$(PY) -m cifar_core.export $(DATA_OPTION)

evaluate: $(READY) ## test accuracy of the exported model
	$(PY) -m cifar_core.evaluate $(if $(MODEL),--model $(MODEL)) $(DATA_OPTION)

report: $(READY) ## docs/results.md and its figures from the committed histories; RUNS=runs: reports/ from your own
	$(PY) -m cifar_core.report $(if $(RUNS),--runs $(RUNS)) $(DATA_OPTION)

test: $(READY) ## all tests but the slow ones
	$(PY) -m pytest

test-slow: $(READY) ## the slow ones
	$(PY) -m pytest -m slow

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## let ruff format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

protos: $(READY) ## generate service/generated from protos/
	$(PY) -m grpc_tools.protoc -Iservice/generated=protos --python_out=. --pyi_out=. --grpc_python_out=. \
	  $(patsubst protos/%,service/generated/%,$(shell find protos -name '*.proto' | sort))

wheel: $(READY) ## build dist/*.whl: library, server and shipped model
	$(PY) -m build --wheel

bench-training: $(READY) ## training throughput beside a plain PyTorch loop, and beside what the machine can multiply
	$(PY) benchmarks/training.py $(DATA_OPTION)
	$(PY) benchmarks/training_ceiling.py $(DATA_OPTION)

bench-recipes: $(READY) ## accuracy and time of our own recipes, one seed each: under an hour; SCRIPT= airbench's beside them
	$(PY) benchmarks/time_to_accuracy.py $(if $(SCRIPT),--script $(SCRIPT)) $(DATA_OPTION)

bench-dependability: $(READY) ## how fast the server starts, refuses and gives up, and its memory around a flood
	$(PY) benchmarks/dependability.py

bench-serving: $(READY) ## serving speed beside Triton, MLServer, Ray Serve and LitServe; installs them; half an hour
	$(PY) benchmarks/serving.py

soak: $(READY) ## two million images at full load: throughput and memory by quarter; half an hour in fp32
	$(PY) benchmarks/soak.py

clean: ## remove what tools left; keeps .venv, data, runs and exports
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
