#pragma once

// How many cells does each layer keep?

#include <cstdint>
#include <vector>

namespace elastic {

class layer_budget {
  public:
    virtual ~layer_budget() = default;

    virtual const char *       name() const   = 0;
    // whether layers may keep different numbers: the runtime then has to mask cells of single layers
    virtual bool               varies() const = 0;
    // whether it takes the shares that a user or a measurement gives (plan_params::layer_share)
    virtual bool               takes_shares() const { return false; }
    // cells of each layer in relation to the others', > 0; the budget holds on average  [n_layer]
    virtual std::vector<float> shares(int32_t n_layer) const { return std::vector<float>(n_layer, 1.0f); }
};

// every layer keeps as many
class uniform_layers : public layer_budget {
  public:
    const char * name() const override { return "uniform"; }
    bool         varies() const override { return false; }
};

// as many as are given for each layer, or every layer as many
class measured_layers : public layer_budget {
  public:
    const char * name() const override { return "measured"; }
    bool         varies() const override { return true; }
    bool         takes_shares() const override { return true; }
};

}  // namespace elastic
