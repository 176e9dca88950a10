// SPDX-License-Identifier: Apache-2.0
// Stand-in for the CUDA toolkit's header: the vector types that Mirage's host code uses, with the toolkit's layout.
#pragma once

struct alignas(8) int2 {
  int x, y;
};

struct int3 {
  int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
