# SPDX-License-Identifier: Apache-2.0
"""Other people's models with this package's layers in them."""
