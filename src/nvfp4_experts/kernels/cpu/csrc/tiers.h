// SPDX-License-Identifier: Apache-2.0
// The tiers of this library, best first.
#pragma once

#include "api.h"

namespace nvfp4 {

int tier_count();
const Tier* tier_at(int index);  // null if there is none

}  // namespace nvfp4
