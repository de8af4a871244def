# SPDX-License-Identifier: Apache-2.0
"""The CPU's own kernel: one native call per shared expert, the best instruction set of this machine chosen at run time.

backend     what `dispatch` sees: packing, scratch, the call
csrc        C++17 with intrinsics; api.h says what is in it; ../native.py loads the library made of it
"""
