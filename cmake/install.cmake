# What the wheel carries: the shared libraries in elastic_llama/lib, finding each other there, and the headers.

include(${CMAKE_CURRENT_LIST_DIR}/llama_cpp_targets.cmake)

llama_cpp_libraries(_libs)
foreach (_lib ${_libs})
    set_property(TARGET ${_lib} PROPERTY EXCLUDE_FROM_ALL OFF)
    install(TARGETS ${_lib}
        LIBRARY DESTINATION elastic_llama/lib COMPONENT python
        RUNTIME DESTINATION elastic_llama/lib COMPONENT python
        PUBLIC_HEADER  DESTINATION include COMPONENT llama_dev
        PRIVATE_HEADER DESTINATION include COMPONENT llama_dev
    )
    add_dependencies(_core ${_lib})
endforeach()

# The C interface, and what it includes: for programs that are compiled against the installed package.
set(_ggml_include ${ELASTIC_LLAMA_CPP_TREE}/ggml/include)
install(FILES
    ${PROJECT_SOURCE_DIR}/cpp/runtime/elastic.h
    ${ELASTIC_LLAMA_CPP_TREE}/include/llama.h
    ${_ggml_include}/ggml.h
    ${_ggml_include}/ggml-alloc.h
    ${_ggml_include}/ggml-backend.h
    ${_ggml_include}/ggml-cpu.h
    ${_ggml_include}/ggml-opt.h
    ${_ggml_include}/gguf.h
    DESTINATION elastic_llama/include COMPONENT python
)

if (ELASTIC_TOOLS)
    include(${CMAKE_CURRENT_LIST_DIR}/llama_cpp_tools.cmake)
endif()
