# A build that runs on other processors than this machine's: what depends on the processor is chosen when it is loaded.
# llama.cpp's CPU backend is one library per kind of processor, loaded at run time. Our own kernels are one library per level
# of x86-64, of which the dynamic loader takes the highest that the processor has (glibc 2.33 and later).

option(ELASTIC_PORTABLE "choose processor-specific code at run time, for wheels" OFF)
if (NOT ELASTIC_PORTABLE)
    return()
endif()

if (NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    message(FATAL_ERROR "[ELASTIC_PORTABLE] the loader of another system, got ${CMAKE_SYSTEM_NAME}, expected Linux")
endif()

foreach (_on BACKEND_DL CPU_ALL_VARIANTS)
    set(GGML_${_on} ON CACHE BOOL "" FORCE)
endforeach()
set(GGML_NATIVE OFF CACHE BOOL "" FORCE)

if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    # each of the others is between two of these; those with AMX are left out (see ELASTIC_AMX)
    set(_variants x64 haswell alderlake skylakex icelake zen4)
    set(ELASTIC_LEVELS x86-64-v3 x86-64-v4)
endif()
set(ELASTIC_CPU_VARIANTS "${_variants}" CACHE STRING "CPU backends that are built, of llama.cpp's; empty: all")

# CPU backends that are not wanted are built empty, and not installed
function(elastic_drop_cpu_variants LIBS)
    set(_kept)
    foreach (_lib ${${LIBS}})
        string(REGEX REPLACE "^ggml-cpu-" "" _variant ${_lib})
        if (_variant STREQUAL _lib OR NOT ELASTIC_CPU_VARIANTS OR _variant IN_LIST ELASTIC_CPU_VARIANTS)
            list(APPEND _kept ${_lib})
        else()
            set_property(TARGET ${_lib} PROPERTY SOURCES ${PROJECT_SOURCE_DIR}/cmake/empty.c)
            set_property(TARGET ${_lib} PROPERTY LINK_LIBRARIES)
        endif()
    endforeach()
    set(${LIBS} ${_kept} PARENT_SCOPE)
endfunction()

# Only backends and libggml have to know that backends are loaded at run time. For the rest everything is as in a native
# build, and is said as there: ccache then has it.
function(elastic_portable_definitions)
    foreach (_property COMPILE_DEFINITIONS INTERFACE_COMPILE_DEFINITIONS)
        get_target_property(_known ggml-base ${_property})
        list(REMOVE_ITEM _known GGML_BACKEND_DL)
        set_property(TARGET ggml-base PROPERTY ${_property} ${_known})
    endforeach()
    target_compile_definitions(ggml INTERFACE GGML_BACKEND_SHARED GGML_USE_CPU GGML_USE_RPC)
endfunction()

# All libraries of the kernels have one name; the dynamic loader looks into glibc-hwcaps first.
function(elastic_install_kernels NAME DIR)
    string(REGEX REPLACE "/[^/]+" "/.." _up "${DIR}")
    set_target_properties(${NAME} PROPERTIES
        OUTPUT_NAME elastic-kernels
        LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/kernels${DIR}
        INSTALL_RPATH "$ORIGIN${_up}"
    )
    install(TARGETS ${NAME} LIBRARY DESTINATION elastic_llama/lib${DIR} COMPONENT python)
endfunction()
