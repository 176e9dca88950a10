// SPDX-License-Identifier: Apache-2.0
// Stand-ins for what mirage-project 0.2.2 defines in .cu files and its host code links against.
//
// All of it belongs to superoptimize(), which runs candidate graphs on a GPU: fingerprint() compares them, profile()
// times them. Building a graph and transpiling it call none of it; whoever does gets this sentence and an abort.
#include "mirage/cpu/cmem_tensor.h"
#include "mirage/kernel/all_reduce.h"
#include "mirage/kernel/customized.h"
#include "mirage/kernel/element_binary.h"
#include "mirage/kernel/element_unary.h"
#include "mirage/kernel/graph.h"
#include "mirage/kernel/matmul.h"
#include "mirage/kernel/operator.h"
#include "mirage/kernel/reduction.h"
#include "mirage/kernel/rms_norm.h"
#include <cstdio>
#include <cstdlib>

namespace mirage::kernel {

namespace {
[[noreturn]] void needs_gpu(char const *what) {
  std::fprintf(stderr, "mirage-project was built without CUDA: %s is not available.\n", what);
  std::abort();
}
} // namespace

#define MIRAGE_NEEDS_GPU(Operator)                                                                 \
  bool Operator::fingerprint() { needs_gpu(#Operator "::fingerprint"); }                           \
  bool Operator::profile(ProfileResult &) { needs_gpu(#Operator "::profile"); }

MIRAGE_NEEDS_GPU(KNAllReduceOp)
MIRAGE_NEEDS_GPU(KNCustomizedOp)
MIRAGE_NEEDS_GPU(KNElementBinaryOp)
MIRAGE_NEEDS_GPU(KNElementUnaryOp)
MIRAGE_NEEDS_GPU(KNInputOp)
MIRAGE_NEEDS_GPU(KNMatmulOp)
MIRAGE_NEEDS_GPU(KNOutputOp)
MIRAGE_NEEDS_GPU(KNReductionOp)
MIRAGE_NEEDS_GPU(KNRMSNormOp)

cpu::CTensor DTensor::copy_fingerprint_to_ctensor() const {
  needs_gpu("DTensor::copy_fingerprint_to_ctensor");
}

bool DTensor::has_same_fingerprint(cpu::CTensor const &) const {
  needs_gpu("DTensor::has_same_fingerprint");
}

} // namespace mirage::kernel
