# SPDX-License-Identifier: Apache-2.0
"""Kernels of kernels/sm90 on a CPU: their CUDA C++ compiled by the host's compiler, every thread of a launch a fiber.

translate.py makes C++ of a kernel's source; machine.hpp is what it runs on: blocks, warps that meet where CUDA says so,
copies and relaxed stores that arrive some time later; instructions.hpp is what it asks for, wgmmas made when they are
waited for. Which warp goes on is drawn, so that another seed is another order of events; lanes of a warp go their own
ways in between. A load from shared memory is carried out at once, and counts as under way until its thread has waited
somewhere: a copy that lands on it meanwhile fails the launch. It knows nothing of time, caches or registers.
"""
