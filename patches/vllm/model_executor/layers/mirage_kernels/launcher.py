# SPDX-License-Identifier: Apache-2.0
"""Loads cubins into the CUDA context of a device and launches them on the current stream."""

import ctypes

import torch
from cuda.bindings import driver

from .arguments import blocks_of, struct_of


class LaunchError(RuntimeError):
    """The CUDA driver refused to load or launch a kernel."""


def _checked(result, *values):
    if result != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"the CUDA driver answered {result.name}")
    return values[0] if len(values) == 1 else values


class LoadedKernel:
    """One entry of one cubin on one device.

    `arguments` names the fields of the kernel's single struct parameter in order (see arguments.py). `overlap` launches with programmatic
    stream serialization (sm_90 and up): the kernel may start while its predecessor on the stream is still running, and waits for it by
    itself before it reads activations.
    """

    def __init__(self, cubin: bytes, entry: str, arguments: list[str], device: torch.device, overlap: bool = True):
        self.device_index = device.index
        self._struct = struct_of(arguments)
        self._pointers = ctypes.c_void_p * 1
        self._overlap = overlap
        self._tokens = arguments.index("num_tokens")
        self._configs: dict[tuple[int, int], driver.CUlaunchConfig] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes torch's context current in this thread
            self._module = _checked(*driver.cuModuleLoadData(cubin))
            self._function = _checked(*driver.cuModuleGetFunction(self._module, entry.encode()))
            shape = (ctypes.c_int * 5)()  # blocks, blocks for each token, threads, cluster, shared bytes: the cubin knows them
            address, _ = _checked(*driver.cuModuleGetGlobal(self._module, b"mirage_launch_shape"))
            _checked(*driver.cuMemcpyDtoH(ctypes.addressof(shape), address, ctypes.sizeof(shape)))
            self.launch_shape = tuple(shape)
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(*driver.cuFuncSetAttribute(self._function, attribute, shape[4]))

    def __call__(self, *values) -> None:
        """Launches with `values` in the order of `arguments` (addresses as int). Does not synchronise."""
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        key = stream, blocks_of(self.launch_shape, values[self._tokens])
        config = self._configs.get(key) or self._configs.setdefault(key, self._make_config(*key))
        struct = self._struct(*values)
        pointers = self._pointers(ctypes.addressof(struct))
        (result,) = driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"the CUDA driver answered {result.name} to a launch")

    def _make_config(self, stream: int, blocks: int):
        _, _, threads, cluster, shared_bytes = self.launch_shape
        attributes = []
        if self._overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
            attributes.append(attribute)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config
