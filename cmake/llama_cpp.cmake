# Finds the patched llama.cpp tree and adds it. Sets ELASTIC_LLAMA_CPP_TREE.

set(ELASTIC_LLAMA_CPP_DIR     "" CACHE PATH     "an already patched llama.cpp tree to build instead of the pinned one")
set(ELASTIC_LLAMA_CPP_ARCHIVE "" CACHE FILEPATH "the pinned source archive, instead of downloading it")

set(_prepare ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/prepare_llama_cpp.py
    --into ${PROJECT_BINARY_DIR}/llama.cpp-src
)
if (ELASTIC_LLAMA_CPP_ARCHIVE)
    list(APPEND _prepare --archive ${ELASTIC_LLAMA_CPP_ARCHIVE})
endif()

if (ELASTIC_LLAMA_CPP_DIR)
    set(ELASTIC_LLAMA_CPP_TREE   ${ELASTIC_LLAMA_CPP_DIR})
    set(ELASTIC_LLAMA_CPP_COMMIT "unknown")
    set(ELASTIC_ARCHIVE_SHA256   "unknown")
    set(ELASTIC_SERIES_HASH      "override")
    set(ELASTIC_PATCHES          "")
else()
    execute_process(COMMAND ${_prepare} OUTPUT_VARIABLE _out RESULT_VARIABLE _rc)
    if (NOT _rc EQUAL 0)
        message(FATAL_ERROR "could not prepare the llama.cpp tree, see the message above")
    endif()
    foreach (_pair "tree;ELASTIC_LLAMA_CPP_TREE" "commit;ELASTIC_LLAMA_CPP_COMMIT" "sha256;ELASTIC_ARCHIVE_SHA256"
                   "series;ELASTIC_SERIES_HASH" "patches;ELASTIC_PATCHES")
        list(GET _pair 0 _key)
        list(GET _pair 1 _var)
        string(REGEX MATCH "${_key}=([^\n]*)" _ "${_out}")
        set(${_var} "${CMAKE_MATCH_1}")
    endforeach()

    # a changed patch series changes the files it touches, and so what is compiled again
    file(GLOB _series CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/patches/*.patch)
    set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
        ${_series} ${PROJECT_SOURCE_DIR}/patches/llama-cpp.pin)
endif()

# llama.cpp asks git for its commit, which would be ours for a tree inside this repository
set(ENV{GIT_CEILING_DIRECTORIES} ${PROJECT_BINARY_DIR})

include(${CMAKE_CURRENT_LIST_DIR}/llama_cpp_options.cmake)

if (NOT ELASTIC_ONLY_CORE)
    add_subdirectory(${ELASTIC_LLAMA_CPP_TREE} llama.cpp EXCLUDE_FROM_ALL)
    if (TARGET ggml-vulkan AND NOT MSVC)  # vulkan.hpp of Debian 12 is a little too old for it
        target_include_directories(ggml-vulkan BEFORE PRIVATE ${CMAKE_CURRENT_LIST_DIR}/vulkan)
    endif()
else()
    add_subdirectory(${ELASTIC_LLAMA_CPP_TREE}/ggml ggml EXCLUDE_FROM_ALL)
endif()
