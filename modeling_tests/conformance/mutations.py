# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Seeds one bug after another into a copy of the package and reports which of the named tests catch it.

Each is a bug that Transformers' and PEFT's own tests let through. None may survive: exit status 1 if one does.

    python modeling_tests/conformance/mutations.py [name ...]
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src" / "yan_hf"


@dataclass
class Mutation:
    """
    A seeded bug.

    Args:
        name: What is broken.
        file: The module.
        old: The text that is replaced, wherever it stands.
        new: What replaces it.
        tests: What should fail: `file::test`, with every parametrization.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


E, M = "model/test_ecosystem.py::", "model/test_modeling.py::"
D, G = "model/test_meta_device.py::", "generation/test_generate_on_meta.py::"
MUTATIONS = [
    Mutation(
        "encoder padding mask ignored",
        "modeling_yan.py",
        "mask = _attention_mask(self.config, inputs_embeds, attention_mask)",
        "mask = None",
        (f"{E}test_the_encoder_keeps_to_its_padding_mask", f"{M}test_padding_changes_no_real_position"),
    ),
    Mutation(
        "cross-attention padding mask ignored",
        "modeling_yan.py",
        "_attention_mask(self.config, positions, source_mask, source_latents)",
        "_attention_mask(self.config, positions, None, source_latents)",
        (f"{E}test_cross_attention_keeps_to_the_source_s_padding_mask",),
    ),
    Mutation(
        "padding reaches the Mamba scan",
        "mixers.py",
        "if padding_mask is None or not self.exact_padding:",
        "if True:",
        ("model/test_mixers.py::test_batched_equals_single",),
    ),
    Mutation(
        "tied keys not declared",
        "modeling_yan.py",
        '_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}',
        "_tied_weights_keys = {}",
        (
            f"{M}test_tied_head_shares_the_token_table_and_survives_saving",
            f"{E}test_sharded_saves_hold_every_weight_once",
        ),
    ),
    Mutation(
        "adaptive norms initialised by their layer, which owns no weight",
        "modeling_yan.py",
        "        elif isinstance(module, AdaLNModulation):\n",
        "        elif isinstance(module, YanFlowLayer) and (module := module.adaptive_norm) is not None:\n",
        (f"{M}test_model_from_a_config_is_initialised",),
    ),
    Mutation(
        "experts left uninitialised",
        "modeling_yan.py",
        "if isinstance(module, YanRoutedExperts):",
        "if False:",
        (f"{M}test_missing_keys_are_initialised_on_load",),
    ),
    Mutation(
        "choice of the experts' kernel ignored",
        "experts.py",
        "        return chosen\n\n    def by_blocks",
        '        return "eager"\n\n    def by_blocks',
        (f"{E}test_the_chosen_kernel_of_the_experts_is_called",),
    ),
    Mutation(
        "experts without the decorator",
        "experts.py",
        "own.get(self.implementation(hidden_states), YanRoutedExperts.forward)",
        "own.get(self.implementation(hidden_states), EAGER_FORWARD)",
        (f"{E}test_a_flow_step_is_exported",),
    ),
    Mutation(
        "a copied model's program calls the experts of the original",
        "inference/cpu_kernels.py",
        'if _EXPERTS.get(getattr(experts, "number", None)) is not experts:',
        'if not hasattr(experts, "number"):',
        ("inference/test_compiled.py::test_large_products_are_operators",),
    ),
    Mutation(
        "what 8 bits leave out of the encoder's states is lost",
        "inference/int8.py",
        "[product[: len(rows)] + product[len(rows) :] for product in products]",
        "[product[: len(rows)] for product in products]",
        ("inference/test_cpu_kernels.py::test_layers_that_read_the_same_states_quantise_them_once",),
    ),
    Mutation(
        "hooks of quantised layers that are multiplied together are not called",
        "layers.py",
        'hasattr(kind := kinds.pop(), "joint") and not any(map(_has_hooks, layers)):',
        'hasattr(kind := kinds.pop(), "joint"):',
        ("inference/test_cpu_kernels.py::test_layers_that_read_the_same_states_quantise_them_once",),
    ),
    Mutation(
        "keys and values projected by the weight itself",
        "layers.py",
        "return [apply_linear(layer, states) for layer in layers]",
        "return [nn.functional.linear(states, layer.weight, layer.bias) for layer in layers]",
        (f"{E}test_offloaded_layers_are_loaded_when_they_are_called",),
    ),
    Mutation(
        "the convolution called by its weight",
        "mixers.py",
        "states = self.conv1d(states)",
        "states = causal_conv(states, self.conv1d.weight, self.conv1d.bias, self.implementation)",
        (f"{E}test_offloaded_layers_are_loaded_when_they_are_called",),
    ),
    Mutation(
        "adaptive scales computed by the weight itself",
        "modeling_yan.py",
        "[layer.adaptive_norm(activated) for layer in self.layers]",
        "[activated @ layer.adaptive_norm.weight.T + layer.adaptive_norm.bias for layer in self.layers]",
        (f"{E}test_disk_offload_by_device_map",),
    ),
    Mutation(
        "flow layers may be split over devices",
        "modeling_yan.py",
        '_no_split_modules = ["YanEncoderLayer", "YanFlowLayer", ',
        '_no_split_modules = ["YanEncoderLayer", ',
        (f"{E}test_no_block_is_split_over_devices",),
    ),
    Mutation(
        "replaced weights stay in the folder",
        "saving.py",
        "        path.unlink(missing_ok=True)",
        "        pass",
        ("hub/test_robust_files.py::test_stale_weights_go_and_other_files_stay",),
    ),
    Mutation(
        "a graph break in every flow layer",
        "layers.py",
        "        if modulation is None:\n            modulation = self.adaptive_norm(",
        "        if hidden_states.sum() > 9 or modulation is None:\n            modulation = self.adaptive_norm(",
        (
            f"{E}test_forward_is_one_graph",
            f"{E}test_training_step_is_one_graph",
        ),
    ),
    Mutation(
        "the encoder looks at its values",
        "modeling_yan.py",
        "        hidden_states = inputs_embeds\n        for layer in self.layers:",
        "        hidden_states = inputs_embeds if inputs_embeds.sum().item() == inputs_embeds.sum().item() else None\n"
        "        for layer in self.layers:",
        (f"{E}test_the_encoder_is_exported", f"{E}test_generate_is_one_graph"),
    ),
    Mutation(
        "the decoder looks at its values",
        "modeling_yan.py",
        "            latents = layer(latents)\n",
        "            latents = layer(latents) if latents.abs().max().item() >= 0 else latents\n",
        (f"{E}test_the_decoder_is_exported",),
    ),
    Mutation(
        "a key-value cache is ignored",
        "validation.py",
        'if arguments.get("past_key_values") is not None:',
        "if False:",
        (f"{E}test_a_key_value_cache_is_refused",),
    ),
    Mutation(
        "generate leaves new adapters in training mode",
        "generation_yan.py",
        "if is_training(self)",
        "if self.training",
        (
            "generation/test_generation.py::test_parts_in_training_mode_generate_in_eval_mode_and_stay_in_training_mode",
        ),
    ),
    Mutation(
        "a compiled call returns the memory of its graph",
        "generation_yan.py",
        "output[name] = output[name].clone()",
        "output[name] = output[name]",
        ("inference/test_compiled.py::test_what_a_call_returns_outlives_the_next_replay",),
    ),
    Mutation(
        "tokens of the vocabulary's second part are counted from 0",
        "sampling.py",
        "torch.where(better, part_tokens + start, tokens)",
        "torch.where(better, part_tokens, tokens)",
        ("generation/test_decoding.py::test_parts_of_the_vocabulary_without_waiting_equal_one_product",),
    ),
    Mutation(
        "given lengths are the caller's memory",
        "lengths.py",
        "lengths.to(device, copy=True)",
        "lengths.to(device)",
        ("generation/test_generation.py::test_given_lengths_stay_the_caller_s",),
    ),
    Mutation(
        "a parallel plan names a layer that is not there",
        "modeling_yan.py",
        '"experts.up_proj": "colwise",',
        '"experts.gate_up_proj": "colwise",',
        (f"{E}test_plans_name_what_the_models_have",),
    ),
    Mutation(
        "the inner width is set beside its multiplier",
        "configuration_yan.py",
        "self.feed_forward_multiplier = size // self.hidden_size",
        "pass",
        (f"{E}test_intermediate_size_sets_the_multiplier",),
    ),
    Mutation(
        "PEFT's defaults not registered",
        "auto.py",
        "        _register_peft()\n",
        "        pass\n",
        ("training/test_peft.py::test_default_targets_are_registered",),
    ),
    Mutation(
        "a mixer looks at padding",
        "layers.py",
        "self.mixer(normed, attention_mask)",
        "self.mixer(normed, None)",
        ("model/test_extending.py::test_a_backbone",),
    ),
    Mutation(
        "a mixer keeps the start of a plain layer",
        "modeling_yan.py",
        'elif hasattr(module, "reset"):',
        "elif False:",
        ("model/test_extending.py::test_a_backbone", "model/test_mixers.py::test_model_from_a_config_is_initialised"),
    ),
    Mutation(
        "an end token in a filling",
        "sampling.py",
        '{"forbidden": forbidden, "end_token_ids": None}',
        '{"end_token_ids": None}',
        ("generation/test_source_start.py::test_what_is_known_stays",),
    ),
    Mutation(
        "masks do not move what is behind them",
        "lengths.py",
        "return torch.where(ends[:, -1:] > 0, aligned, stretched)",
        "return stretched",
        ("generation/test_source_start.py::test_every_position_starts_from_the_token_that_stands_there",),
    ),
    Mutation(
        "limits of a text's length ignored",
        "lengths.py",
        "is_allowed = (sums >= lowest[:, None]) & (sums <= highest[:, None])",
        "is_allowed = (sums >= 0).expand(len(lowest), -1)",
        ("generation/test_source_start.py::test_the_likeliest_sums_are_those_of_a_full_search",),
    ),
    Mutation(
        "padding belongs to the run of its neighbour",
        "layers.py",
        "places = torch.where(canvas > 0, places, -1)",
        "pass",
        ("generation/test_source_start.py::test_positions_know_how_many_neighbours_share_their_token",),
    ),
    Mutation(
        "no layer starts as the identity",
        "modeling_yan.py",
        'elif getattr(module, "ends_residual", False) and self.config.residual_init_scale != 1:',
        "elif False:",
        ("generation/test_source_start.py::test_a_new_model_can_copy_its_source",),
    ),
    Mutation(
        "what is new in a word belongs to the token behind it",
        "data/alignment.py",
        "lengths[max(0, start - 1)] += count",
        "lengths[min(start, len(lengths) - 1)] += count",
        ("data/test_alignment.py::test_tokens_that_stay_stand_for_themselves",),
    ),
    Mutation(
        "lengths of tokens of another corruption",
        "data/collator.py",
        'if self.align or "token_lengths" in feature:',
        "if False:",
        ("data/test_alignment.py::test_fresh_errors_get_fresh_lengths",),
    ),
    Mutation(
        "neighbours from one token write the same",
        "sampling.py",
        "(tokens[:, 1:] == tokens[:, :-1])",
        "(tokens[:, 1:] < 0)",
        ("generation/test_source_start.py::test_neighbours_from_one_token_do_not_write_the_same",),
    ),
    Mutation(
        "stratified samples forget their place",
        "experts.py",
        "place = torch.where(attention_mask[:, first].bool(), following, place)",
        "place = torch.where(attention_mask[:, first].bool(), following * 0, place)",
        ("model/test_coherent_experts.py::test_stratified_choices_divide_the_gate_and_go_on_dividing",),
    ),
    Mutation(
        "the neighbour that loses most gives way",
        "sampling.py",
        "is_first = is_pair & (lost[:, :-1] < lost[:, 1:])",
        "is_first = is_pair & (lost[:, :-1] > lost[:, 1:])",
        ("generation/test_source_start.py::test_neighbours_from_one_token_do_not_write_the_same",),
    ),
    Mutation(
        "the host looks whether a mask is all ones",
        "modeling_yan.py",
        'skip = mask is None or states.device.type == "cpu"',
        "skip = True",
        (f"{D}test_forward", f"{D}test_training_step", f"{G}test_only_lengths_are_read"),
    ),
    Mutation(
        "times copied from the host's memory",
        "modeling_yan.py",
        "timesteps = torch.stack([torch.full((), time, **kind) for time in times])",
        "timesteps = torch.tensor(times, **kind)",
        (f"{G}test_only_lengths_are_read",),
    ),
    Mutation(
        "frequencies of the time made on the CPU",
        "layers.py",
        "torch.arange(self.half_size, device=timesteps.device, dtype=angle_dtype)",
        "torch.arange(self.half_size, dtype=angle_dtype)",
        (f"{D}test_forward", f"{D}test_training_step", f"{G}test_only_lengths_are_read"),
    ),
    Mutation(
        "a loss term read by the host",
        "losses.py",
        "return count.clamp(min=torch.finfo(mask.dtype).tiny)",
        "return max(count.item(), 1)",
        (f"{D}test_training_step", f"{D}test_auto_encoding"),
    ),
    Mutation(
        "the gate checked at every solver step",
        "sampling.py",
        "is_finite = torch.isfinite(log_probs).all()",
        "is_finite = torch.tensor(bool(torch.isfinite(log_probs).all()))",
        (f"{G}test_only_lengths_are_read", f"{G}test_offloaded_experts_read_the_choice_of_experts_alone"),
    ),
    Mutation(
        "lengths read twice",
        "sampling.py",
        "return max(self.host_lengths)",
        "return int(self.lengths.max())",
        (f"{G}test_only_lengths_are_read", f"{G}test_every_stop_of_a_call"),
    ),
    Mutation(
        "a block's votes counted on the CPU",
        "experts.py",
        "starts = torch.arange(num_blocks, device=mask.device)",
        "starts = torch.arange(num_blocks)",
        (f"{D}test_forward", f"{G}test_only_lengths_are_read"),
    ),
    Mutation(
        "slots of offloaded experts left on the CPU",
        "inference/expert_cache.py",
        "torch.tensor(slots, device=self.device)",
        "torch.tensor(slots)",
        (f"{G}test_offloaded_experts_read_the_choice_of_experts_alone",),
    ),
    Mutation(
        "blocks of tokens on the host",
        "experts.py",
        "return torch.zeros_like(attention_mask, dtype=torch.long)",
        "return torch.zeros(attention_mask.shape, dtype=torch.long)",
        (f"{G}test_only_lengths_are_read",),
    ),
    Mutation(
        "values at a mask in a choice",
        "sampling.py",
        "return torch.where(is_real, experts, experts[:, :1])",
        "experts[~is_real.expand_as(experts)] = experts[0, 0].flatten()[0]\n        return experts",
        (f"{G}test_only_lengths_are_read",),
    ),
    Mutation(
        "the scan's first state on the host",
        "selective_scan.py",
        "state = torch.zeros(scan.state_shape, dtype=output.dtype, device=u.device)",
        "state = torch.zeros(scan.state_shape, dtype=output.dtype)",
        (f"{D}test_the_scan_in_chunks",),
    ),
    Mutation(
        "MMD's random keys on the host",
        "losses.py",
        "keys = torch.rand(len(points), generator=generator, device=points.device) + weights",
        "keys = torch.rand(len(points), generator=generator) + weights",
        (f"{D}test_the_mmd_of_more_points_than_it_takes",),
    ),
    Mutation(
        "core sets that look at their votes",
        "experts.py",
        "is_kept = before <= options.core_threshold",
        "is_kept = before <= options.core_threshold\n    votes.is_meta or bool(votes.isfinite().all())",
        (f"{G}test_every_stop_of_a_call",),
    ),
    Mutation(
        "winners among the batch's targets alone",
        "modeling_yan.py",
        "if len(tokens) >= _FEWEST_TOKENS:",
        "if True:",
        ("model/test_coherent_experts.py::test_targets_of_one_token_are_told_apart_in_training",),
    ),
    Mutation(
        "winners outside of core sets",
        "modeling_yan.py",
        "winners = scores.masked_fill(is_outside, -torch.inf).argmax(dim=-1)",
        "winners = scores.argmax(dim=-1)",
        ("model/test_coherent_experts.py::test_winners_are_sought_in_the_core_set",),
    ),
    Mutation(
        "usage of first blocks alone",
        "experts.py",
        "return is_counted & (blocks != before)",
        "return is_counted & (blocks == 0) & (blocks != before)",
        ("training/test_expert_usage.py::test_every_block_that_counts_is_a_choice",),
    ),
    Mutation(
        "stratified room of all experts",
        "experts.py",
        "room = is_allowed.sum(dim=-1, keepdim=True)",
        "room = torch.ones_like(is_allowed).sum(dim=-1, keepdim=True)",
        ("model/test_coherent_experts.py::test_stratified_choices_stay_apart_in_core_sets_and_under_a_sharp_gate",),
    ),
]


def failing_tests(mutation: Mutation, folder: Path) -> list[str]:
    """The named tests that fail with the bug in place."""
    package = folder / "yan_hf"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    module = package / mutation.file
    text = module.read_text()
    if mutation.old not in text:
        raise RuntimeError(
            f"{mutation.name}: its text is no longer in {mutation.file}; bring the mutation up to date."
        )
    module.write_text(text.replace(mutation.old, mutation.new))
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    caught = []
    for test in mutation.tests:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / test)]
        finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if finished.returncode not in (0, 1):  # neither passed nor failed: no such test, or it did not even start
            raise RuntimeError(f"{mutation.name}: pytest could not run {test}:\n{finished.stdout[-2000:]}")
        if finished.returncode == 1:
            caught.append(test)
    return caught


def main(names: list[str]) -> int:
    if unknown := set(names) - {mutation.name for mutation in MUTATIONS}:
        raise SystemExit(f"mutations: there is no mutation {', '.join(sorted(unknown))}.")
    survived = 0
    for mutation in MUTATIONS:
        if names and mutation.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            caught = failing_tests(mutation, Path(folder))
        missed = [test for test in mutation.tests if test not in caught]
        survived += not caught
        print(f"{'caught' if caught else 'SURVIVED'}: {mutation.name}", flush=True)
        for test in caught:
            print(f"    by {test}")
        for test in missed:
            print(f"    not by {test}")
    print(f"{survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
