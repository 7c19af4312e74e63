# make demo: set everything up and describe the embedded image. make test: run the tests.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# what the compiled part is made of; Python files need no rebuild
NATIVE := CMakeLists.txt $(wildcard cmake/* cmake/stock/* cpp/*/* cpp/core/policies/* patches/*.p*)

export CMAKE_ARGS += -DLLAMA_BUILD=OFF

.PHONY: demo test test-matrix build lint format sanitize stubs check-stubs check-patches wheel-test clean

demo: $(VENV)/.installed
	$(VENV)/bin/elastic-llama demo

test: $(VENV)/.installed
	$(PY) -m pytest

# every case of the matrix of cuts, a quarter of an hour
test-matrix: $(VENV)/.installed
	$(PY) -m pytest -m matrix

# what an isolated build would bring; here, so that rebuilding after a change takes seconds
$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q scikit-build-core pybind11==3.1.0 cmake ninja  # the stubs depend on pybind11
	$(PY) -m pip install -q "setuptools>=70.1"  # rouge-score comes as source; older ones make no wheel of it alone
	$(PY) -m pip install -q llama-cpp-python==0.3.36
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(NATIVE)
	$(PY) -m pip install -q --no-build-isolation -e ".[test]"
	touch $@

build: $(VENV)/.tools
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch -c $(VENV)/.installed

$(VENV)/.dev: $(VENV)/.installed
	$(PY) -m pip install -q -e ".[dev]" --no-build-isolation
	touch $@

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(shell git ls-files 'cpp/*.cpp' 'cpp/*.h' 'tests/cpp/*.cpp' 'examples/*.c')

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(shell git ls-files 'cpp/*.cpp' 'cpp/*.h' 'tests/cpp/*.cpp' 'examples/*.c')

# the core alone, under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: $(VENV)/.tools
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build-sanitize -G Ninja -DELASTIC_ONLY_CORE=ON \
		-DELASTIC_BUILD_TESTS=ON -DELASTIC_SANITIZE=address,undefined \
		-DSKBUILD_PROJECT_VERSION=0 -DPython_EXECUTABLE=$(CURDIR)/$(PY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build-sanitize --target core_test runtime_test
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ctest --test-dir build-sanitize --output-on-failure

stubs: $(VENV)/.dev
	$(PY) scripts/make_stubs.py

check-stubs: $(VENV)/.dev
	$(PY) scripts/make_stubs.py --check

# builds a wheel, looks into it, installs it where there is no compiler, and runs the demo there
wheel-test: $(VENV)/.installed
	$(PY) scripts/check_wheel.py

# which hunks apply to the release before the pinned one; the answer goes into patches/README.md
check-patches:
	$(PYTHON) scripts/check_patches.py --markdown

clean:
	rm -rf build build-sanitize $(VENV)
