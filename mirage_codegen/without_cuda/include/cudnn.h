// SPDX-License-Identifier: Apache-2.0
// Stand-in for cuDNN's header: Mirage names it only inside a macro that its host code never expands.
#pragma once
