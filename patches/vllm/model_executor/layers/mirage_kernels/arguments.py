# SPDX-License-Identifier: Apache-2.0
"""The parameter of a kernel: one struct, whose fields kernels.json names in order."""

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path

ARGUMENTS: dict[str, list[str]] = json.loads((Path(__file__).parent / "kernels.json").read_text())
SCALARS = {
    "num_tokens": ctypes.c_int,
    "page_size": ctypes.c_int,
    "table_stride": ctypes.c_int,
    "page_stride": ctypes.c_longlong,
    "token_stride": ctypes.c_longlong,
    "head_stride": ctypes.c_longlong,
    "eps": ctypes.c_float,
    "scale": ctypes.c_float,
}
"""Every field that is not here is the address of a tensor."""


def struct_of(names: Sequence[str]) -> type[ctypes.Structure]:
    """The struct with those fields, laid out as CUDA C++ lays it out."""
    return type("Arguments", (ctypes.Structure,), {"_fields_": [(name, SCALARS.get(name, ctypes.c_void_p)) for name in names]})


def blocks_of(launch_shape: Sequence[int], num_tokens: int) -> int:
    """Blocks of a launch: of every launch, and for each token."""
    return launch_shape[0] + launch_shape[1] * num_tokens
