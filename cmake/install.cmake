# The shared libraries that the wheel carries, in elastic_llama/lib, finding each other there.

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
