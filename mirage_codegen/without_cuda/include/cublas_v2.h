// SPDX-License-Identifier: Apache-2.0
// Stand-in for cuBLAS's header: Mirage's host code declares members of this type and never uses them.
#pragma once
#include <cuda_runtime_api.h>

typedef struct cublasContext *cublasHandle_t;
