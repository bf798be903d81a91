#pragma once
#include "simt/cuda_runtime.h"  // stands in for CUDA's header of this name
