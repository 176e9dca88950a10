// SPDX-License-Identifier: Apache-2.0
// Stand-in for the CUDA toolkit's header: Mirage's host code declares members of this type and never uses them.
#pragma once
#include <vector_types.h>

typedef struct CUstream_st *cudaStream_t;
