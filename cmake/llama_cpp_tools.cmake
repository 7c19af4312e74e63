# llama.cpp's server and tools with the options of the elastic cache: programs in elastic_llama/bin, their libraries beside the others.

include(${CMAKE_CURRENT_LIST_DIR}/elastic_common.cmake)
elastic_common(${ELASTIC_LLAMA_CPP_TREE})

if (APPLE)
    set(_origin "@loader_path")
else()
    set(_origin "$ORIGIN")
endif()

set(_programs llama-server llama-cli llama-mtmd-cli llama-batched-bench)
set(_their_libs llama-common llama-server-impl llama-cli-impl llama-batched-bench-impl)
foreach (_target ${_programs} ${_their_libs})
    set_property(TARGET ${_target} PROPERTY EXCLUDE_FROM_ALL OFF)
endforeach()
foreach (_lib ${_their_libs})
    set_property(TARGET ${_lib} PROPERTY VERSION)
    set_property(TARGET ${_lib} PROPERTY SOVERSION)
    set_property(TARGET ${_lib} PROPERTY INSTALL_RPATH "${_origin}")
endforeach()
foreach (_program ${_programs})
    set_property(TARGET ${_program} PROPERTY INSTALL_RPATH "${_origin}/../lib")
endforeach()

install(TARGETS ${_programs} RUNTIME DESTINATION elastic_llama/bin COMPONENT python)
install(TARGETS ${_their_libs}
    LIBRARY DESTINATION elastic_llama/lib COMPONENT python
    RUNTIME DESTINATION elastic_llama/lib COMPONENT python
)
