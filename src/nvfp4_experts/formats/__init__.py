# SPDX-License-Identifier: Apache-2.0
"""Number formats: code tables, NVFP4, MXFP4 and block-scaled FP8. Imports nothing above `errors`."""
