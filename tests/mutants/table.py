# SPDX-License-Identifier: Apache-2.0
"""Mistakes that people make with this format, each as one replaced piece of source, and the test that must catch it.

`old` must occur exactly once in the file: a mutant whose text is gone is a broken guard, and says so.
"""

from __future__ import annotations

from .integrations import INTEGRATIONS
from .mutant import Mutant
from .of_kernels import OF_KERNELS

MUTANTS = (
    *OF_KERNELS,
    *INTEGRATIONS,
    # layers over ranks
    Mutant(
        "parts of ranks overlap where they are uneven",
        "layers/shards.py",
        "first = rank * size + min(rank, longer)",
        "first = rank * size",
        "tests/layers/test_parallel.py::test_parts_are_even_whole_and_in_order",
    ),
    Mutant(
        "dynamic scales by the tokens of one rank",
        "layers/dispatched.py",
        "return gather(mine, self.group).amax()",
        "return mine[0]",
        "tests/layers/test_parallel.py::test_over_ranks[dispatched_slots_are_the_whole_layer_bit_for_bit]",
    ),
    Mutant(
        "parts in memory are added from the last one on",
        "layers/peers.py",
        "add_in_order([part[begin:end] for part in self._parts], shares[self.rank])",
        "add_in_order([part[begin:end] for part in reversed(self._parts)], shares[self.rank])",
        "tests/layers/test_parallel.py::test_over_ranks[memory_that_all_ranks_reach_gives_the_same_sums]",
    ),
    Mutant(
        "a shard's columns of down begin where the first one's do",
        "kernels/sm90/over_shards.py",
        "begin = sum(fragment_bytes(ROWS, size) for size in self.sizes[:rank])",
        "begin = 0",
        "tests/kernels/test_sm90_over_shards.py::test_shards_placed_are_the_whole_layer_packed[2-256]",
    ),
    # formats: codes
    Mutant(
        "nibbles packed the other way round",
        "formats/codes.py",
        "return (pairs | (pairs >> 4)).to(torch.uint8)",
        "return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)",
        "tests/formats/test_codes.py::test_even_k_is_the_low_nibble",
    ),
    Mutant(
        "nibbles unpacked the other way round",
        "formats/codes.py",
        "torch.stack((packed & 0xF, packed >> 4), dim=-1)",
        "torch.stack((packed >> 4, packed & 0xF), dim=-1)",
        "tests/formats/test_codes.py::test_pack_and_unpack_every_byte",
    ),
    Mutant(
        "ties go toward zero",
        "formats/codes.py",
        ".clamp_(max=0x40C0_0000)",
        ".clamp_(max=0x40C0_0000).sub_(1).clamp_(min=0)",
        "tests/formats/test_codes.py::test_encode_breaks_ties_to_the_even_code",
    ),
    Mutant(
        "the largest value of another e4m3",
        "formats/codes.py",
        "E4M3_MAX = 448.0",
        "E4M3_MAX = 240.0",
        "tests/formats/test_codes.py::test_encode_e4m3_rounds_to_the_nearest_and_saturates",
    ),
    Mutant(
        "e8m0 exponents off by one",
        "formats/codes.py",
        "byte << 23)",
        "(byte + 1) << 23)",
        "tests/formats/test_codes.py::test_decode_e8m0_of_every_byte",
    ),
    # formats: scales
    Mutant(
        "global scale made as its reciprocal",
        "formats/recipes.py",
        "return s.reciprocal(), s\n",
        "return s, s.reciprocal()\n",
        "tests/formats/test_nvfp4.py::TestDequantize::test_error_of_a_round_trip",
    ),
    Mutant(
        "another recipe's floor",
        "formats/recipes.py",
        "(block_amax / E2M1_MAX / s).clamp(min=2.0**-6)",
        "(block_amax / E2M1_MAX / s).clamp(min=2.0**-9)",
        "tests/formats/test_nvfp4.py::TestQuantizeSpecialValues::test_zero_blocks_and_negative_zero_beside_values",
    ),
    Mutant(
        "another recipe's order of operations",
        "formats/recipes.py",
        "block_amax / (E2M1_MAX * s)",
        "block_amax / E2M1_MAX / s",
        "tests/formats/test_recipes.py::test_bytes_equal_the_oracle",
    ),
    Mutant(
        "global scale dropped when decoding",
        "formats/nvfp4.py",
        "values.mul_(self.global_scale).to(dtype)",
        "values.to(dtype)",
        "tests/formats/test_nvfp4.py::TestDequantize::test_is_one_exact_product_then_one_rounding",
    ),
    Mutant(
        "one amax for all rows of a per-token batch",
        "formats/activations.py",
        "amax = x.abs().amax(-1, keepdim=True)\n    else:",
        "amax = x.abs().amax().expand(*x.shape[:-1], 1)\n    else:",
        "tests/formats/test_activations.py::test_per_token_rows_stand_alone",
    ),
    Mutant(
        "one MXFP4 scale for one NVFP4 block",
        "formats/mxfp4.py",
        ".repeat_interleave(2, dim=-1)",
        ".repeat(*[1] * (t.scales.ndim - 1), 2)",
        "tests/formats/test_mxfp4.py::test_cast_keeps_every_value_and_every_code_byte",
    ),
    Mutant(
        "FP8 block height and width exchanged",
        "formats/fp8_block.py",
        "height, width = self.block",
        "width, height = self.block",
        "tests/formats/test_fp8_block.py::test_dequantize_follows_the_definition",
    ),
    # layouts
    Mutant(
        "swizzle with lanes and groups exchanged",
        "layouts/scales.py",
        "padded_rows // TILE_ROWS, _GROUPS, _LANES,",
        "padded_rows // TILE_ROWS, _LANES, _GROUPS,",
        "tests/layouts/test_scales.py::test_golden_bytes",
    ),
    Mutant(
        "up interleaved before gate",
        "layouts/weights.py",
        "interleave_rows(gate.codes, up.codes), interleave_rows(gate.block_scales, up.block_scales)",
        "interleave_rows(up.codes, gate.codes), interleave_rows(up.block_scales, gate.block_scales)",
        "tests/layouts/test_weights.py::test_gate_and_up_interleave_codes_and_scales_together",
    ),
    Mutant(
        "a bit of a fragment in its neighbour's place",
        "layouts/fragments.py",
        "_CODE_BITS = 15, 8, 7, 6",
        "_CODE_BITS = 15, 8, 6, 7",
        "tests/layouts/test_fragments.py::test_rotations_and_masks_of_the_kernel_read_bf16_values",
    ),
    Mutant(
        "halves of a fragment word exchanged",
        "layouts/fragments.py",
        "permute(0, 3, 2, 6, 4, 5, 1, 7)",
        "permute(0, 3, 2, 6, 4, 5, 1, 7).flip(-1)",
        "tests/layouts/test_fragments.py::test_every_element_is_where_the_closed_form_says",
    ),
    Mutant(
        "codes under a zero scale keep their magnitude",
        "layouts/fragments.py",
        "torch.where(under_zero, nibbles & 8, nibbles)",
        "nibbles",
        "tests/layouts/test_fragments.py::test_codes_under_a_zero_scale_lose_their_magnitude_and_nothing_else",
    ),
    # experts that come one at a time
    Mutant(
        "streaming: the expert at hand is kept while the next is made",
        "layers/streaming.py",
        "            self._current = ()  # type: ignore[assignment]  # forgotten before the next one is made\n",
        "",
        "tests/layers/test_routed_experts.py::test_an_expert_is_forgotten_before_the_next_is_made",
    ),
    Mutant(
        "streaming: gate and up under scales of their own",
        "layers/streaming.py",
        "joint = joint_amax(gate, up)",
        "joint_amax(gate, up)",
        "tests/layers/test_routed_experts.py::test_from_lists_and_stacks_and_floating_weights",
    ),
    Mutant(
        "loading: a share of a layer asks only itself for its mode",
        "checkpoints/load.py",
        "_has_input_scales(checkpoint.routed_experts(layer))",
        "_has_input_scales(entries)",
        "tests/checkpoints/test_load_moe.py::test_shares_of_a_layer_have_one_mode",
    ),
    Mutant(
        "loading: scales of some experts are scales of none",
        "checkpoints/load.py",
        "(None if scales.isnan().all() else scales for scales in known.unbind(1))",
        "(None if scales.isnan().any() else scales for scales in known.unbind(1))",
        "tests/checkpoints/test_load_moe.py::test_experts_without_scales_do_not_hide_those_of_the_others",
    ),
    Mutant(
        "FP8: a NaN on a CPU is 480",
        "formats/codes.py",
        "        wide.masked_fill_(bits == _E4M3_NAN, torch.nan)\n",
        "        pass\n",
        "tests/formats/test_codes.py::test_decode_e4m3_of_every_byte",
    ),
    Mutant(
        "over ranks: shares may leave experts out",
        "layers/parallel.py",
        "([first for first, _ in runs] != ends[:-1] or ends[-1] != num_experts)",
        "(ends[-1] != num_experts)",
        "tests/layers/test_parallel.py::test_experts_that_are_held_twice_or_by_nobody",
    ),
    Mutant(
        "routing: token ids count from the end",
        "layers/routing.py",
        "functional.embedding(token_ids, self.tid2eid)",
        "self.tid2eid[token_ids]",
        "tests/layers/test_routing.py::test_ids_outside_the_table_do_not_wrap_around",
    ),
    Mutant(
        "autocast rounds a router's logits",
        "layers/routing.py",
        "with without_autocast(x.device):",
        "with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type)):",
        "tests/layers/test_autocast.py::test_router",
    ),
    Mutant(
        "loading: every model weighs as DeepSeek-V4 does",
        "checkpoints/load.py",
        'in (None, "deepseek_v4") else "after_down"',
        'in (None, "deepseek_v4") else "before_down"',
        "tests/checkpoints/test_load_moe.py::test_weighting_is_that_of_the_models_own_code",
    ),
    Mutant(
        "loading: to keep a shared expert is to quantise it",
        "checkpoints/load.py",
        'if shared == "keep" and not is_fp4(entry):',
        'if shared == "keep" and is_fp4(entry) is None:',
        "tests/checkpoints/test_load_moe.py::test_a_hybrid_block_is_its_parts",
    ),
    Mutant(
        "FP8 rows decoded as if they began a block",
        "formats/fp8_block.py",
        "first, last = start // height, -(-stop // height)",
        "first, last = start // height + (start % height > 0), -(-stop // height)",
        "tests/formats/test_fp8_block.py::test_rows_are_those_of_the_whole_wherever_blocks_begin",
    ),
    # layers
    Mutant(
        "calibration forgets earlier calls",
        "layers/calibration.py",
        "scale if previous is None else torch.maximum(scale, previous)",
        "scale",
        "tests/layers/test_shared_expert.py::TestCalibration::test_running_maximum_over_calls",
    ),
    Mutant(
        "dtype conversion of a model converts scales",
        "layers/packed.py",
        "fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape)",
        "fn(t)",
        "tests/layers/test_shared_expert.py::TestState::test_dtype_conversions_leave_the_bytes_alone",
    ),
    Mutant(
        "the bias does not choose",
        "layers/routing.py",
        "scores if bias is None else scores + bias",
        "scores",
        "tests/layers/test_routing.py::test_against_loops",
    ),
    Mutant(
        "the shared expert's result is rounded before it is added",
        "kernels/one_by_one.py",
        "total.add_(more)",
        "total.add_(more.to(x.dtype))",
        "tests/kernels/test_cpu_routed.py::test_a_shared_expert_that_differs_runs_after_them",
    ),
    # bench
    Mutant(
        "ends of chains compared in place of calls",
        "diagnostics/bench/timing.py",
        "yield y, call(x)",
        "yield self._states[-1], chain(self._calls, self._states[0])[-1]",
        "tests/diagnostics/test_bench_timing.py::test_a_candidate_whose_last_bits_vary_is_not_called_wrong",
    ),
    Mutant(
        "experts hit again along a chain",
        "diagnostics/bench/moe.py",
        "dealt, deck = deck[: len(distinct)], deck[len(distinct) :]",
        "dealt = deck[: len(distinct)]",
        "tests/diagnostics/test_bench_moe.py::test_routings_of_a_chain",
    ),
    Mutant(
        "a floor without the shared expert",
        "diagnostics/bench/work.py",
        "experts = hits + self.shared",
        "experts = hits",
        "tests/diagnostics/test_bench_moe.py::test_the_floor_counts_every_byte_and_every_product",
    ),
    # checkpoints
    Mutant(
        "gate and up exchanged in a dialect",
        "checkpoints/dialects.py",
        '{"w1": "gate", "w3": "up", "w2": "down"}',
        '{"w1": "up", "w3": "gate", "w2": "down"}',
        "tests/checkpoints/test_reader.py::test_names",
    ),
    Mutant(
        "a reciprocal scale read as it stands",
        "checkpoints/projections.py",
        "(stored.reciprocal() if projection.layout.reciprocal else stored)",
        "(stored)",
        "tests/checkpoints/test_reader.py::test_input_scales_are_read_in_decode_direction",
    ),
    Mutant(
        "a reciprocal scale written as it is",
        "checkpoints/weights.py",
        "reciprocal_scale(scale) if reciprocal else scale",
        "scale",
        "tests/checkpoints/test_convert.py::test_input_scales_are_written_where_they_belong",
    ),
    Mutant(
        "gate and up converted under two scales",
        "checkpoints/weights.py",
        "for p in (source, partner) if p is not None)",
        "for p in (source,) if p is not None)",
        "tests/checkpoints/test_convert.py::test_scaled_weights_become_what_quantize_makes_of_the_whole",
    ),
)
