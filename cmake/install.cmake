# The shared libraries that the wheel carries, in elastic_llama/lib, finding each other there.

if (APPLE)
    set(_origin "@loader_path")
else()
    set(_origin "$ORIGIN")
endif()

set(_libs llama mtmd ggml ggml-base)
foreach (_backend cpu blas cuda hip metal musa rpc sycl vulkan opencl cann)
    if (TARGET ggml-${_backend})
        list(APPEND _libs ggml-${_backend})
    endif()
endforeach()

foreach (_lib ${_libs})
    # wheels hold no symbolic links, so libraries carry no version in their names
    set_property(TARGET ${_lib} PROPERTY VERSION)
    set_property(TARGET ${_lib} PROPERTY SOVERSION)
    set_target_properties(${_lib} PROPERTIES
        INSTALL_RPATH          "${_origin}"
        BUILD_WITH_INSTALL_RPATH OFF
        EXCLUDE_FROM_ALL       OFF
    )
    install(TARGETS ${_lib}
        LIBRARY DESTINATION elastic_llama/lib COMPONENT python
        RUNTIME DESTINATION elastic_llama/lib COMPONENT python
        PUBLIC_HEADER DESTINATION include COMPONENT llama_dev
    )
    add_dependencies(_core ${_lib})
endforeach()
