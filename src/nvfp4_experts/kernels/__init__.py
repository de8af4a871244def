# SPDX-License-Identifier: Apache-2.0
"""Compute. `ops` is the door for layers, `reference` the contract; `dispatch` chooses; `target` knows the machine."""
