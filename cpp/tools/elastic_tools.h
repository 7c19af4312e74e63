#pragma once

// All that llama.cpp's tools ask of this folder. The one header of ours that they include (common.h).

#include "elastic_media.h"
#include "elastic_metrics.h"
#include "elastic_options.h"
#include "elastic_slots.h"
