# elastic_common(TREE): what patches/0201 asks for, compiled into llama.cpp's library of its tools.

set(_elastic_cpp ${CMAKE_CURRENT_LIST_DIR}/../cpp)

function(elastic_common TREE)
    target_sources(llama-common PRIVATE
        ${_elastic_cpp}/tools/elastic_media.cpp ${_elastic_cpp}/tools/elastic_metrics.cpp ${_elastic_cpp}/tools/elastic_options.cpp)
    target_include_directories(llama-common PRIVATE ${TREE}/vendor)
    target_include_directories(llama-common PUBLIC ${_elastic_cpp} ${_elastic_cpp}/tools)
endfunction()
