# `make demo` and `make test` do all the set-up on a fresh machine. A second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the demo needs, and what everything else needs besides.
DEMO_INSTALLED := $(VENV)/.demo
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow soak clients torchvision editors check docs dist wheels clean

demo: $(DEMO_INSTALLED)
	$(BIN)/dali-diffusemix demo $(DEMO)

# On all cores; TESTS= gives pytest arguments of its own. A test by itself: .venv/bin/python -m pytest tests/test_plan.py
PYTEST = $(BIN)/python -m pytest -q --numprocesses auto --dist worksteal
test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(TESTS)

# The tests that take seconds each, mostly for the processes that they start. CI runs them too.
slow: $(INSTALLED)
	$(PYTEST) -m slow $(TESTS)

# A quarter of an hour: kills, damage, memory, a million rows, Ray, a browser. Leaves a record; SOAK= gives pytest arguments of its own.
SOAK_RECORD = benchmarks/results/$(shell date +%F)-$(shell nproc)cores-soak.json
soak: $(INSTALLED)
	DALI_DIFFUSEMIX_SOAK_RECORD=$(SOAK_RECORD) $(BIN)/python -m pytest -q tests/soak $(SOAK)

# Other people's training scripts and frameworks, in an environment of their own with PyPI's torch: 7 GB, a quarter of
# an hour. Leaves a record. tests/clients/conftest.py says where the scripts of timm and torchvision are looked for.
CLIENTS := .clients
CLIENTS_RECORD = benchmarks/results/$(shell date +%F)-$(shell nproc)cores-clients.json
CLIENTS_TESTS = tests/clients $(addprefix tests/integrations/test_,timm.py lightning.py accelerate.py transformers.py)
clients: $(CLIENTS)/.installed
	DALI_DIFFUSEMIX_CLIENTS_RECORD=$(CLIENTS_RECORD) $(CLIENTS)/bin/python -m pytest -q -p no:cacheprovider $(or $(TESTS),$(CLIENTS_TESTS))

# Composer by itself: it asks for a torch of 2025, and only what it imports is installed beside it.
$(CLIENTS)/.installed: setup.py pyproject.toml tests/clients/requirements.txt tests/clients/composer.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q --upgrade pip "setuptools>=80" wheel
	$(CLIENTS)/bin/python -m pip install -q -e '.[cpu]' -r tests/clients/requirements.txt
	$(CLIENTS)/bin/python -m pip install -q --no-deps -r tests/clients/composer.txt
	touch $@

# augment= against torchvision and timm themselves, in an environment of their own with PyPI's torch: 7 GB, a quarter of
# an hour. Leaves a record. `compare.py freeze` writes the values that `make test` compares with.
TORCHVISION := .torchvision
TORCHVISION_RECORD = benchmarks/results/$(shell date +%F)-torchvision.json
PHOTOGRAPHS ?= ../shared/data/imagenet_sample
torchvision: $(TORCHVISION)/.installed
	PYTHONPATH=tests:benchmarks:. $(TORCHVISION)/bin/python tests/against_torchvision/compare.py $(PHOTOGRAPHS) --out $(TORCHVISION_RECORD)

$(TORCHVISION)/.installed: setup.py pyproject.toml tests/against_torchvision/environment.sh
	tests/against_torchvision/environment.sh $(TORCHVISION) $(PYTHON)
	touch $@

# The diffusion models whose parts need torchvision, which has no CPU build, in the same environment.
editors: $(TORCHVISION)/.installed
	$(TORCHVISION)/bin/python -m pip install -q -e '.[generate,quantize]' pytest
	$(TORCHVISION)/bin/python -m pytest -q -p no:cacheprovider tests/test_adapters.py $(TESTS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict tests/typed_user.py
	! command -v $(CXX) > /dev/null || $(CXX) -std=c++17 -O2 -Wall -Wextra -Werror -fsyntax-only kernels/*.cpp tests/distribution/call.cpp

# The pages, into site/. With FIGURES=demo, the folder that `make demo` leaves, their figures are drawn anew.
docs: $(INSTALLED)
	$(if $(FIGURES),$(BIN)/python docs/figures.py $(FIGURES) docs/figures)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

# What would be published, checked in a new virtual environment: the source distribution, and the wheel made of it.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/distribution/check.py dist

# The wheels for x86-64 and AArch64, checked, into wheelhouse/. AArch64's wants Debian's g++-aarch64-linux-gnu and qemu-user.
wheels: $(INSTALLED)
	$(BIN)/python tests/distribution/wheels.py wheelhouse

clean:
	rm -rf $(VENV) build dist site wheelhouse *.egg-info kernels/*.so

# uv installs, where there is one, else pip. uv has to be told to build kernels/ anew. Nothing is compiled that may never run.
UV := $(shell command -v uv 2> /dev/null)
PIP = $(BIN)/python -m pip install --no-compile -c constraints.txt
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python --reinstall-package dali-diffusemix -c constraints.txt,$(PIP))

# The page of torch's CPU builds: PyPI's for x86-64 brings gigabytes of CUDA. `make TORCH_LINKS=` takes torch from where pip
# or uv is set up to look. So does pip where the page does not answer; uv stops there, and pip is asked.
export TORCH_LINKS ?= https://download.pytorch.org/whl/cpu/torch/
TORCH = --no-deps torch $(addprefix --find-links ,$(TORCH_LINKS))

# Torch first and by itself: an unpinned requirement would fetch another.
$(DEMO_INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard kernels/*.cpp kernels/*.*h)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.version.split()[0]} found: make PYTHON=python3.12")'
	@echo "Installing what the demo needs into $(VENV); the next time it is there."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(UV),UV_HTTP_RETRIES=1 $(INSTALL) $(TORCH) || )$(PIP) --retries 1 $(TORCH)
	$(INSTALL) -e '.[cpu,demo]'
	touch $@

$(INSTALLED): $(DEMO_INSTALLED)
	@echo "Installing what the tests and checks need into $(VENV), which takes some minutes; the next time it is there."
	$(INSTALL) --upgrade pip "setuptools>=80" wheel
	$(INSTALL) -e '.[cpu,dev]'
	touch $@
