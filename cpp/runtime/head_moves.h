#pragma once

// Rows of K and V move, head by head, into the rows of evicted cells: on the host by copying, on a device by one graph for all layers.

#include "runtime/kv_view.h"

#include "ggml-cpp.h"

#include <map>
#include <memory>

namespace elastic {

class head_moves {
  public:
    explicit head_moves(const kv_view & kv);
    ~head_moves();

    // Row `from` of each layer and head goes to row to[il][ih]; where that is `from`, nothing moves. Empty: nothing in that layer.
    void run(uint32_t strm, int32_t from, const std::vector<std::vector<int32_t>> & to);

  private:
    class device;

    const kv_view &                                                            kv;
    std::vector<int32_t>                                                       by_copy;    // layers
    std::map<ggml_backend_dev_t, std::vector<int32_t>>                         layers_of;  // the others, by their device
    std::map<std::pair<ggml_backend_dev_t, uint32_t>, std::unique_ptr<device>> devices;    // and stream; made when they are needed
};

}  // namespace elastic
