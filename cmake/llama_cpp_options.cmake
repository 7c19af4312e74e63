# The settings under which llama.cpp is built, for the package and for the stock build that tests compare with.
# All of llama.cpp's and ggml's own options (GGML_METAL, GGML_CUDA, ...) pass through unchanged.

set(BUILD_SHARED_LIBS ON)
foreach (_part TESTS EXAMPLES APP)
    set(LLAMA_BUILD_${_part} OFF CACHE BOOL "" FORCE)
endforeach()
option(ELASTIC_TOOLS "build llama.cpp's server and tools too, with the elastic cache (make server)" OFF)
foreach (_part COMMON TOOLS SERVER)
    set(LLAMA_BUILD_${_part} ${ELASTIC_TOOLS} CACHE BOOL "" FORCE)
endforeach()
foreach (_part BUILD USE_PREBUILT)
    set(LLAMA_${_part}_UI OFF CACHE BOOL "" FORCE)  # its sources are not in the archive
endforeach()
set(LLAMA_BUILD_MTMD ON  CACHE BOOL "")
set(LLAMA_CURL       OFF CACHE BOOL "")
set(LLAMA_OPENSSL    OFF CACHE BOOL "")
set(GGML_NATIVE      ON  CACHE BOOL "ggml: optimize the build for the current system")
set(GGML_RPC         ON  CACHE BOOL "ggml: use other machines as devices")

if (APPLE)
    set(GGML_METAL               ON CACHE BOOL "ggml: use Metal")
    set(GGML_METAL_EMBED_LIBRARY ON CACHE BOOL "ggml: embed the Metal shaders")
endif()

# ggml's AMX kernels crash on virtual machines that advertise AMX without keeping its state
option(ELASTIC_AMX "let ggml use Intel AMX" OFF)
if (NOT ELASTIC_AMX AND NOT MSVC AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag("-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" ELASTIC_HAVE_NO_AMX)
    if (ELASTIC_HAVE_NO_AMX)
        add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
    endif()
endif()

find_program(CCACHE_PROGRAM ccache)
if (CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    # paths relative to the build tree: what one clone compiled, another one and the stock build find again
    string(FIND "${CMAKE_BINARY_DIR}" "${CMAKE_SOURCE_DIR}/" _at)
    if (_at EQUAL 0)
        set(_base ${CMAKE_SOURCE_DIR})
    else()
        set(_base ${CMAKE_BINARY_DIR})
    endif()
    set(CMAKE_CXX_COMPILER_LAUNCHER
        ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${_base} CCACHE_NOHASHDIR=1 ${CCACHE_PROGRAM})
    set(CMAKE_C_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
    set(GGML_CCACHE OFF CACHE BOOL "" FORCE)
endif()
