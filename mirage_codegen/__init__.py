# SPDX-License-Identifier: Apache-2.0
"""Kernel generator: fused ops as Mirage μGraphs, lowered to CUDA. Used by developers; never imported while serving."""
