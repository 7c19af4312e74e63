// The machine's vulkan.hpp, and what ggml-vulkan names of VK_EXT_layer_settings where it is older than 1.3.272, as Debian 12's.
// Only a build with GGML_VULKAN_VALIDATE lets a layer read these settings.

#pragma once
#pragma GCC system_header  // for include_next

#include_next <vulkan/vulkan.hpp>

#if VK_HEADER_VERSION < 239
#error "ggml-vulkan needs Vulkan's headers of 1.3.239 or later; newer ones need no build: -DVulkan_INCLUDE_DIR=/path/to/include"
#endif

#ifndef VK_EXT_layer_settings

#include <cstdint>
#include <vector>

namespace VULKAN_HPP_NAMESPACE {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char *        layer;
    const char *        name;
    LayerSettingTypeEXT type;
    uint32_t            n_values;
    const void *        values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & s) : n(uint32_t(s.size())), settings(s.data()) {}

    VkStructureType         type = VkStructureType(1000496000);
    const void *            next = nullptr;
    uint32_t                n;
    const LayerSettingEXT * settings;
};

}  // namespace VULKAN_HPP_NAMESPACE

#endif
