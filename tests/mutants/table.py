# SPDX-License-Identifier: Apache-2.0
"""Mistakes that people make with this format, each as one replaced piece of source, and the test that must catch it.

`old` must occur exactly once in the file: a mutant whose text is gone is a broken guard, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One wrong version of one file.

    Args:
        name: what went wrong, in words.
        file: the file below src/nvfp4_experts.
        old: source text that occurs exactly once in it.
        new: what the mistake would have written instead.
        killed_by: the pytest node id that must fail on it.
    """

    name: str
    file: str
    old: str
    new: str
    killed_by: str


MUTANTS = (
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
    # kernels
    Mutant(
        "clamp lost",
        "kernels/tiled.py",
        "gate.clamp_(max=limit), up.clamp_(-limit, limit)",
        "gate, up",
        "tests/kernels/test_shared_expert.py::test_clamp_is_one_sided_for_gate_and_two_sided_for_up",
    ),
    Mutant(
        "gate clamped from below too",
        "kernels/tiled.py",
        "gate.clamp_(max=limit)",
        "gate.clamp_(-limit, limit)",
        "tests/kernels/test_shared_expert.py::test_clamp_is_one_sided_for_gate_and_two_sided_for_up",
    ),
    Mutant(
        "gate and up exchanged in the pack",
        "kernels/plain.py",
        "torch.cat((gate.codes, up.codes))",
        "torch.cat((up.codes, gate.codes))",
        "tests/kernels/test_shared_expert.py::test_backend_matches_reference",
    ),
    Mutant(
        "gate's global scale used for up",
        "kernels/tiled.py",
        "up_tile, up_scale",
        "up_tile, gate_scale",
        "tests/kernels/test_shared_expert.py::test_gate_and_up_keep_their_own_global_scales",
    ),
    Mutant(
        "weight's global scale dropped",
        "kernels/tiled.py",
        "global_scale if scale is None else scale * global_scale, out=",
        "torch.ones_like(global_scale) if scale is None else scale, out=",
        "tests/kernels/test_shared_expert.py::test_backend_matches_reference",
    ),
    Mutant(
        "h rounded to bf16 before it is quantised",
        "kernels/tiled.py",
        "h_dtype = torch.bfloat16 if",
        "h_dtype = torch.bfloat16 if True or",
        "tests/kernels/test_shared_expert.py::test_backend_matches_reference",
    ),
    Mutant(
        "the contract itself forgets half the clamp",
        "kernels/reference.py",
        "up.clamp(-limit, limit)",
        "up.clamp(max=limit)",
        "tests/kernels/test_shared_expert.py::test_backend_matches_reference",
    ),
    Mutant(
        "a named backend falls back in silence",
        "kernels/dispatch.py",
        'wanted = BACKENDS if name == "auto" else (name,)',
        "wanted = BACKENDS",
        "tests/kernels/test_dispatch.py::test_a_named_backend_that_refuses_is_not_replaced",
    ),
    # kernels: routed experts
    Mutant(
        "routed: every expert has the first one's static scales",
        "kernels/one_by_one.py",
        "None if s is None else s[expert]",
        "None if s is None else s[0]",
        "tests/kernels/test_routed_experts.py::test_each_expert_has_scales_of_its_own",
    ),
    Mutant(
        "routed: slots are added from the last to the first",
        "kernels/one_by_one.py",
        "in rows.unbind(1)",
        "in reversed(rows.unbind(1))",
        "tests/kernels/test_routed_experts.py::test_slots_are_added_in_ascending_order",
    ),
    Mutant(
        "routed: an expert that is not here is taken for the nearest",
        "kernels/one_by_one.py",
        "torch.where(here, indices, experts)",
        "indices.clamp(0, experts - 1)",
        "tests/kernels/test_routed_experts.py::test_what_is_not_here_adds_nothing",
    ),
    Mutant(
        "routed: the contract itself takes the amax of x from one expert's tokens",
        "kernels/reference.py",
        "values, scale = enter(x, activations, activation_scale, x_scale)",
        "values, scale = enter(x * (indices == expert).any(-1, True), activations, activation_scale, x_scale)",
        "tests/kernels/test_routed_experts.py::test_reference_is_the_definition",
    ),
    Mutant(
        "routed: calibration sees h without its weight",
        "layers/routed_experts.py",
        "h = h * weights[token, slot, None]",
        "h = h + 0 * weights[token, slot, None]",
        "tests/layers/test_routed_experts.py::test_calibration_covers_what_each_expert_saw",
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
    # kernels: the CPU's own
    Mutant(
        "nibbles of a packed row exchanged",
        "layouts/rows.py",
        "permute(0, 2, 3, 1, 5, 4)",
        "permute(0, 2, 3, 1, 5, 4).flip(-1)",
        "tests/layouts/test_rows.py::test_golden_bytes",
    ),
    Mutant(
        "C++: low and high nibbles exchanged",
        "kernels/cpu/csrc/dot.h",
        "w[2 * j][v].of[i] = kTable.of[both & 15];",
        "w[2 * j][v].of[i] = kTable.of[both >> 4];",
        "tests/kernels/test_cpu.py::test_drawn_cases_equal_the_definition_to_the_bit",
    ),
    Mutant(
        "C++: the first token's amax for all",
        "kernels/cpu/csrc/enter.h",
        "if (entry.scale_mode == kPerToken) amax = row_amax(entry.x, entry.element, source,",
        "if (entry.scale_mode == kPerToken) amax = row_amax(entry.x, entry.element, 0,",
        "tests/kernels/test_cpu.py::test_drawn_cases_equal_the_definition_to_the_bit",
    ),
    Mutant(
        "C++: up clamped on one side",
        "kernels/cpu/csrc/vector.h",
        "up = up < -limit ? splat(-limit) : up;",
        "",
        "tests/kernels/test_cpu.py::test_drawn_cases_equal_the_definition_to_the_bit",
    ),
    Mutant(
        "C++: gate's global scale used for up",
        "kernels/cpu/csrc/tier.cpp",
        "scale[r] = weight_scale(piece, r, v, half.global_scales[r]);",
        "scale[r] = weight_scale(piece, r, v, half.global_scales[0]);",
        "tests/kernels/test_cpu.py::test_drawn_cases_equal_the_definition_to_the_bit",
    ),
    Mutant(
        "C++, routed: every expert has the first one's static scales",
        "kernels/cpu/csrc/routed_experts.cpp",
        "return of_all ? of_all + expert : nullptr;",
        "return of_all;",
        "tests/kernels/test_routed_experts.py::test_cpu_to_the_bit",
    ),
    Mutant(
        "C++, routed: slots are added from the last to the first",
        "kernels/cpu/csrc/tier.cpp",
        "for (int64_t slot = t * sum.top_k; slot < (t + 1) * sum.top_k; ++slot) {",
        "for (int64_t slot = (t + 1) * sum.top_k - 1; slot >= t * sum.top_k; --slot) {",
        "tests/kernels/test_routed_experts.py::test_slots_are_added_in_ascending_order",
    ),
    Mutant(
        "C++, routed: rows of a later batch are taken from the first",
        "kernels/cpu/csrc/routed_experts.cpp",
        "h_values + b.first * r.h_bytes(), scales + b.first};",
        "h_values + (b.first - first) * r.h_bytes(), scales + b.first};",
        "tests/kernels/test_cpu_routed.py::test_more_rows_than_a_batch",
    ),
    Mutant(
        "an edited checkout runs old code",
        "kernels/native.py",
        "if expected is not None and library.source_digest != expected:",
        "if expected is None:",
        "tests/kernels/test_cpu.py::test_a_library_of_other_sources_is_not_run",
    ),
    # kernels: Blackwell's sum
    Mutant(
        "exact: to nearest, not toward zero",
        "kernels/exact/rule.py",
        "(terms / grid).trunc().sum(0)",
        "(terms / grid).round().sum(0)",
        "tests/kernels/test_exact.py::test_figures_worked_by_hand",
    ),
    Mutant(
        "exact: 34 fractional bits",
        "kernels/exact/rule.py",
        "FRACTION_BITS = 35",
        "FRACTION_BITS = 34",
        "tests/kernels/test_exact.py::test_figures_worked_by_hand",
    ),
    Mutant(
        "exact: the sum so far is not cut",
        "kernels/exact/rule.py",
        "(sums / grid).trunc()",
        "(sums / grid)",
        "tests/kernels/test_exact.py::test_figures_worked_by_hand",
    ),
    Mutant(
        "exact: the sum so far has no say in the grid",
        "kernels/exact/rule.py",
        "torch.maximum(powers.amax(0), _power(sums))",
        "powers.amax(0)",
        "tests/kernels/test_exact.py::test_figures_worked_by_hand",
    ),
    Mutant(
        "exact: a sum rounded to fp32",
        "kernels/exact/rule.py",
        "sums = _cut_to_fp32(total * grid + 0.0)",
        "sums = (total * grid + 0.0).float()",
        "tests/kernels/test_exact.py::test_figures_worked_by_hand",
    ),
    Mutant(
        "exact: scales have signs",
        "kernels/exact/rule.py",
        "pad(scale_bytes & 0x7F, (0, missing))",
        "pad(scale_bytes, (0, missing))",
        "tests/kernels/test_exact.py::test_figures_worked_by_hand",
    ),
    Mutant(
        "exact: auto takes it",
        "kernels/dispatch.py",
        "BACKENDS = tuple(_MODULES)\n",
        'BACKENDS = (*_MODULES, "exact")\n',
        "tests/kernels/test_dispatch.py::test_auto_never_takes_what_must_be_asked_for",
    ),
    Mutant(
        "C++ exact: to nearest, not toward zero",
        "kernels/cpu/csrc/exact.h",
        "nearest > magnitude ? nearest - grid : nearest",
        "nearest",
        "tests/kernels/test_exact.py::test_figures_worked_by_hand",
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
        "layers/moe.py",
        "self.shared(x.float())",
        "self.shared(x)",
        "tests/layers/test_moe.py::test_routed_and_shared_are_added_in_fp32_and_rounded_once",
    ),
    # kernels: configurations of the Hopper GEMM
    Mutant(
        "a configuration for each number of tokens",
        "kernels/sm90/choice.py",
        "_choose(hidden, intermediate, range_limit(tokens), target)",
        "_choose(hidden, intermediate, tokens, target)",
        "tests/kernels/test_sm90_choice.py::test_a_choice_is_a_function_of_the_range",
    ),
    Mutant(
        "a table's configurations taken on trust",
        "kernels/sm90/table.py",
        "self.require(reason is None, place,",
        "self.require(True, place,",
        "tests/kernels/test_sm90_choice.py::test_each_fault_of_a_table_is_named",
    ),
    Mutant(
        "a wrong candidate timed",
        "diagnostics/tune/search.py",
        "if errors[0] <= REFERENCE_BOUND and errors[1] <= CANDIDATE_BOUND:",
        "if errors[0] <= REFERENCE_BOUND or errors[1] <= CANDIDATE_BOUND:",
        "tests/cli/test_tune.py::test_wrong_candidates_cannot_win_and_are_told",
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
