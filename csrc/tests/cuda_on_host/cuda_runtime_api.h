// Stands in for the part of CUDA that needs no compiler support.

#pragma once

#include "cuda_runtime.h"
