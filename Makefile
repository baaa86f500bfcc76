# Every target creates or updates .venv itself. `make help` lists the targets.
PYTHON    ?= python3
PROCESSOR ?= cpu
DATA      ?=
SEED      ?= 0
DEVICE    ?= auto
PRECISION ?=
MODEL     ?=
OPTIONS   ?=
HTTP_PORT ?= 8080
RUNS      ?=
SCRIPT    ?=
SEEDS     ?= 3
RECIPES   ?=
SECONDS   ?= 600
ATTACKS   ?=

VENV  := .venv
PY    := $(VENV)/bin/python
# .venv has two stages: the packages for serving, and all packages.
SERVE := $(VENV)/.serve-$(PROCESSOR)
READY := $(VENV)/.ready-$(PROCESSOR)
RAY   := $(VENV)/.ray
# The generator of service/generated is older than the packages in .venv, so it has a folder of its own.
GENERATOR := $(VENV)/generator
OLDEST    := .venv-oldest
# Takes precedence over the onnxruntime in .venv.
OPENVINO  := $(VENV)/openvino

DATA_OPTION  = $(if $(DATA),--data '$(DATA)')
TRAIN_OPTIONS = --seed $(SEED) --device $(DEVICE) $(if $(PRECISION),--precision $(PRECISION)) --resume $(DATA_OPTION)

OLDEST_TESTS := tests/service/client tests/service/core/test_metrics.py tests/service/core/test_model_store.py \
  tests/service/rpc/test_classify.py tests/service/rpc/test_server.py tests/service/test_settings.py tests/service/test_logs.py \
  tests/service/core/test_decoding_attacks.py::test_a_lossless_jpeg_is_decoded_in_full_size_under_the_limits
OLDEST_TOOLS := pytest pytest-timeout hypothesis trustme onnx psutil

# `make train export` must run in this order, even with -j.
.NOTPARALLEL:
.PHONY: help demo serve setup data train export evaluate report test test-slow test-oldest test-openvino lint format protos wheel bench-training bench-recipes gpu bench-dependability bench-serving bench-scaling kserve-sdk soak attacks chaos fuzz clean
.DEFAULT_GOAL := help

help: ## list the targets and the variables that can be set
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DATA=cifar10 | FOLDER | synthetic[:N]   the data (default: \$$CIFAR10_DATA; otherwise the official archive is downloaded)"
	@echo "  SEED=0  DEVICE=auto|cpu|cuda  PRECISION=fp32|bf16   for training (default: the recipe's, but fp32 on CPUs without bf16)"
	@echo "  MODEL=exported/model.onnx | runs/RECIPE/SEED | grpc://HOST:PORT   the model that evaluate measures"
	@echo "  OPTIONS='--port 50051 …'                options of the server"
	@echo "  HTTP_PORT=8080                          port of the page and of REST that make serve opens"
	@echo "  PROCESSOR=cpu|cuda|openvino             which build of onnxruntime to install"

demo: $(SERVE) ## serve the shipped model, classify the pictures in samples/, and stop; does not install PyTorch
	$(PY) -m service.demo

serve: $(SERVE) ## serve exported/ over gRPC on 127.0.0.1:50051 and HTTP on 8080 until Ctrl-C; OPTIONS='--help' lists its options
	$(PY) -m service --model exported --http-port $(HTTP_PORT) $(OPTIONS)

setup: $(READY) ## create or update .venv with all packages

# The builds of onnxruntime install the same module, so the other build is removed first.
$(SERVE): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	if ls $(VENV)/.serve-* >/dev/null 2>&1 && ! test -e $@; then $(PY) -m pip uninstall -q -y onnxruntime onnxruntime-gpu onnxruntime-openvino; fi
	$(PY) -m pip install -q -c constraints.txt -e '.[$(PROCESSOR),http]'
	rm -f $(VENV)/.serve-* $(VENV)/.ready-* $(RAY)
	touch $@

$(READY): $(SERVE) $(GENERATOR)/.ready
	$(PY) -m pip install -q -c constraints.txt -e '.[$(PROCESSOR),http,tracing,score,deploy,train,dev]'
	touch $@

# Ray is large, and only slow tests need it.
$(RAY): $(READY)
	$(PY) -m pip install -q -c constraints.txt -e '.[ray,ray-serve]'
	touch $@

$(GENERATOR)/.ready: constraints-oldest.txt | $(SERVE)
	rm -rf $(GENERATOR)
	$(PY) -m pip install -q --no-deps --target $(GENERATOR) -c constraints-oldest.txt grpcio-tools
	touch $@

data: $(READY) ## print a summary of the data and its statistics, draw figure 1
	$(PY) -m cifar_core.data $(DATA_OPTION)

train: $(READY) ## train dropout-0.2, deep and deep-fast; resumes stopped runs, skips finished ones
	$(PY) -m cifar_core.train dropout-0.2 $(TRAIN_OPTIONS)
	$(PY) -m cifar_core.train deep $(TRAIN_OPTIONS)
	$(PY) -m cifar_core.train deep-fast $(TRAIN_OPTIONS)

export: $(READY) ## export the finished run with the best validation accuracy to exported/
	$(PY) -m cifar_core.export $(DATA_OPTION)

evaluate: $(READY) ## measure the test accuracy of the exported model, or of MODEL
	$(PY) -m cifar_core.evaluate $(if $(MODEL),--model '$(MODEL)') $(DATA_OPTION)

report: $(READY) ## write docs/results.md from the committed histories; with RUNS=runs, write reports/ from your own runs
	$(PY) -m cifar_core.report $(if $(RUNS),--runs '$(RUNS)') $(DATA_OPTION)

# Many tests wait for a server, so two files at a time take less time. More than one thread each would make both slower.
test: $(READY) ## run all tests except the slow ones
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-slow: $(RAY) ## run the slow tests
	$(PY) -m pytest -m slow

$(OPENVINO)/.ready: constraints.txt | $(READY)
	rm -rf $(OPENVINO)
	$(PY) -m pip install -q --no-deps --target $(OPENVINO) -c constraints.txt onnxruntime-openvino
	touch $@

test-openvino: $(OPENVINO)/.ready ## test serving and measuring with OpenVINO
	PYTHONPATH=$(OPENVINO) $(PY) -m pytest tests/test_openvino.py

test-oldest: ## test the client and the server with the lowest versions that pyproject.toml allows, in .venv-oldest
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e '.[$(PROCESSOR)]' $(OLDEST_TOOLS)
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS)

lint: $(READY) ## run ruff, mypy and import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(READY) ## fix and format the code with ruff
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

protos: $(READY) ## generate service/generated from protos/, with the generator that constraints-oldest.txt names
	PYTHONPATH=$(GENERATOR) $(PY) -m grpc_tools.protoc -Iservice/generated=protos --python_out=. --pyi_out=. \
	  --grpc_python_out=. $(patsubst protos/%,service/generated/%,$(shell find protos -name '*.proto' | sort))

wheel: $(READY) ## build dist/*.whl with library, server and shipped model
	$(PY) -m build --wheel

bench-training: $(READY) ## compare training throughput with a plain PyTorch loop and with the machine's peak
	$(PY) benchmarks/training.py $(DATA_OPTION)
	$(PY) benchmarks/training_ceiling.py $(DATA_OPTION)

bench-recipes: $(READY) ## measure accuracy and time of our recipes, SEEDS=3; hours; skips finished runs; SCRIPT=FILE also runs airbench's script
	$(PY) benchmarks/time_to_accuracy.py --seeds $(SEEDS) $(if $(RECIPES),--recipes "$(RECIPES)") $(if $(SCRIPT),--script $(SCRIPT)) $(DATA_OPTION)

gpu: $(READY) ## with PROCESSOR=cuda and a CUDA device: its tests, training, export and serving in under 25 minutes; SCRIPT=FILE also runs airbench's script
	$(PY) benchmarks/gpu.py $(if $(SCRIPT),--script $(SCRIPT)) $(DATA_OPTION)

bench-dependability: $(READY) ## measure start, deadlines, refusals and memory of the server
	$(PY) benchmarks/dependability.py

bench-serving: $(READY) $(OPENVINO)/.ready ## install Triton, MLServer, Ray Serve and LitServe and compare serving speed with theirs; half an hour
	$(PY) benchmarks/serving.py

bench-scaling: $(READY) ## measure capacity per core, and latency of one to three servers against an estimate; 12 minutes
	$(PY) benchmarks/scaling.py measure

kserve-sdk: ## install KServe's SDK into .venv-kserve, so that the tests check deploy/kserve with its classes
	$(PYTHON) -m venv .venv-kserve
	.venv-kserve/bin/pip install -q 'kserve==0.21.0'

soak: $(READY) ## send two million images at full load, and two million through the clients; throughput and memory by quarter; half an hour
	$(PY) benchmarks/soak.py
	$(PY) benchmarks/client_soak.py

attacks: $(READY) ## attack a server with default options and compare the measurements with limits; ATTACKS=--all runs all
	$(PY) -m tests.attacks $(ATTACKS)

chaos: $(READY) ## run a server under full load while workers, files and clients fail; SECONDS=600 SEED=0
	$(PY) -m tests.chaos --seconds $(SECONDS) --seed $(SEED)

fuzz: $(READY) ## fuzz the decoder of each image format and both request parsers; SECONDS=600 for each of 7 targets
	$(PY) -m tests.fuzz --seconds $(SECONDS)

clean: ## remove caches and build files; keeps .venv, data, runs and exports
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
