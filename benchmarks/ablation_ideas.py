# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Ideas beyond the configuration, as changes to a model that `ablations.py` trains or asks. None of them is in the
package: each would have to measure better at as many passes of the trunk first.
"""

import copy
import math

import torch
from torch import nn

import yan_hf.modeling_yan
import yan_hf.sampling
from yan_hf import YanForConditionalGeneration
from yan_hf.solver import solve_flow, time_grid


def condition_on_estimate(model: YanForConditionalGeneration):
    """Self-conditioning (Chen et al. 2022): each pass sees where the last one pointed; in training half the time."""
    flow = model.model.flow
    flow.estimate_proj = nn.Linear(model.config.hidden_size, model.config.hidden_size)
    nn.init.zeros_(flow.estimate_proj.weight)
    nn.init.zeros_(flow.estimate_proj.bias)
    plain, estimate = flow.forward, None

    def forward(latents, timesteps, context, experts=None, conditioning=None, **keywords):
        nonlocal estimate
        time = timesteps if timesteps is not None else latents.new_tensor([_time_of(context, conditioning)])
        if experts is None:
            # The flow term's pass, at a random time: an estimate of its own.
            estimate = None
            if flow.training and torch.rand(()) < 0.5:
                with torch.no_grad():
                    velocity = plain(latents, timesteps, context, None, conditioning).velocity
                    estimate = latents + (1 - time)[:, None, None] * velocity
        elif time.numel() == 1 and float(time) == 0:
            estimate = None
        # A zero estimate costs nothing, and keeps the projection in every graph.
        shown = torch.zeros_like(latents) if estimate is None else estimate
        output = plain(latents + flow.estimate_proj(shown), timesteps, context, experts, conditioning, **keywords)
        estimate = (latents + (1 - time)[:, None, None] * output.velocity).detach()
        return output

    flow.forward = forward


def predict_clean_latent(model: YanForConditionalGeneration):
    """Experts give the end point; the velocity is what leads there in the time that is left, at least a twentieth."""
    experts, flow = model.model.flow.experts, model.model.flow
    plain_flow, plain_experts = flow.forward, experts.forward
    now = {}

    def fields(hidden_states, index=None, weights=None):
        points = plain_experts(hidden_states, index, weights)
        state, left = now["state"], now["left"]
        return (points - (state[:, None] if points.dim() == 3 else state)) / (
            left[:, None] if points.dim() == 3 else left
        )

    def forward(latents, timesteps, context, experts=None, conditioning=None, **keywords):
        time = timesteps if timesteps is not None else latents.new_tensor([_time_of(context, conditioning)])
        left = (1 - time).clamp(min=0.05).expand(len(latents))[:, None, None].expand(*latents.shape[:2], 1)
        now.update(state=latents.flatten(0, 1), left=left.flatten(0, 1))
        return plain_flow(latents, timesteps, context, experts, conditioning, **keywords)

    experts.forward, flow.forward = fields, forward


def _time_of(context, conditioning) -> float:
    return next(time for time, known in context.conditioning.items() if known is conditioning)


def noise_for_the_decoder(model: YanForConditionalGeneration):
    """The decoder's input is disturbed in training, so that it learns to read latents that are a little off."""

    def disturb(module, arguments):
        (latents,) = arguments
        return (latents + 0.1 * torch.randn_like(latents),) if module.training else None

    model.model.decoder.register_forward_pre_hook(disturb)


def learn_sigma(model: YanForConditionalGeneration):
    """The experts' standard deviation is a parameter, which the flow term's whole density determines."""
    model.log_sigma = nn.Parameter(torch.zeros(()))

    def flow_matching_nll(expert_fields, gate_log_probs, velocity, sigma):
        squared = (expert_fields.float() - velocity.float()[..., None, :]).square().sum(dim=-1)
        size = velocity.shape[-1]
        log_densities = -0.5 * squared * torch.exp(-2 * model.log_sigma) - size * (
            model.log_sigma + 0.5 * math.log(2 * math.pi)
        )
        return -torch.logsumexp(gate_log_probs.float() + log_densities, dim=-1)

    yan_hf.modeling_yan.flow_matching_nll = flow_matching_nll


def normalise_latents(model: YanForConditionalGeneration):
    """The flow ends at latents of mean 0 and variance 1 in every dimension; running statistics are kept for it."""
    base, size = model.model, model.config.hidden_size
    base.register_buffer("latent_mean", torch.zeros(size))
    base.register_buffer("latent_std", torch.ones(size))
    plain = base.encode

    def encode(input_ids=None, attention_mask=None, inputs_embeds=None, is_target=False, **keywords):
        output = plain(input_ids, attention_mask, inputs_embeds, is_target, **keywords)
        if is_target:
            if base.training:
                with torch.no_grad():
                    tokens = output.last_hidden_state[attention_mask.bool()]
                    base.latent_mean.lerp_(tokens.mean(dim=0), 0.02)
                    base.latent_std.lerp_(tokens.std(dim=0), 0.02)
            output.last_hidden_state = (output.last_hidden_state - base.latent_mean) / base.latent_std
        return output

    def restore(module, arguments):
        (latents,) = arguments
        # Copies: the statistics change in place before the gradient is taken.
        return (latents * base.latent_std.clone() + base.latent_mean.clone(),)

    base.encode = encode
    base.decoder.register_forward_pre_hook(restore)


def guide(model: YanForConditionalGeneration, scale: float = 1.5, dropped: float = 0.1):
    """Classifier-free guidance (Ho and Salimans 2022): a tenth of the sources is not shown; two passes a step."""
    base, flow = model.model, model.model.flow
    base.no_source = nn.Parameter(torch.zeros(model.config.hidden_size))
    plain_context, plain_flow = base.prepare_context, flow.forward

    def prepare_context(source_latents, *arguments, **keywords):
        if base.training:
            hidden = torch.rand(len(source_latents), 1, 1) < dropped
            return plain_context(torch.where(hidden, base.no_source, source_latents), *arguments, **keywords)
        context = plain_context(source_latents, *arguments, **keywords)
        context.without_source = plain_context(base.no_source.expand_as(source_latents), *arguments, **keywords)
        return context

    def forward(latents, timesteps, context, experts=None, conditioning=None, **keywords):
        output = plain_flow(latents, timesteps, context, experts, conditioning, **keywords)
        if not base.training:
            # The same experts on both sides, so that the difference is the source's.
            blind = plain_flow(
                latents, timesteps, context.without_source, output.expert_indices, conditioning, **keywords
            )
            output.velocity = blind.velocity + scale * (output.velocity - blind.velocity)
        return output

    base.prepare_context, flow.forward = prepare_context, forward


def distil(model: YanForConditionalGeneration, teacher_steps: int = 32):
    """The latent term's target is where the model as it was arrives in many steps, from the same noise and experts."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    plain_context, plain_latent_loss = model.model.prepare_context, yan_hf.modeling_yan.latent_loss
    end = None

    def prepare_context(*arguments, **keywords):
        context = plain_context(*arguments, **keywords)
        with torch.no_grad():
            context.teacher = teacher.model.prepare_context(*arguments, **keywords)
        return context

    def solve(flow, initial_state, context, times, select, *arguments):
        nonlocal end
        latents, experts = solve_flow(flow, initial_state, context, times, select, *arguments)
        with torch.no_grad():
            end, _ = solve_flow(teacher.model.flow, initial_state, context.teacher, time_grid(teacher_steps), experts)
        return latents, experts

    def latent_loss(latents, target_latents, mask, group=None):
        return plain_latent_loss(latents, end, mask, group)

    model.model.prepare_context = prepare_context
    yan_hf.modeling_yan.solve_flow, yan_hf.modeling_yan.latent_loss = solve, latent_loss


def renoise_doubtful(model: YanForConditionalGeneration):
    """After the steps asked for, fresh noise for the less certain half of a text, and one more step from t = 2/3."""
    generator = torch.Generator().manual_seed(0)

    def solve(flow, initial_state, context, times, select, *arguments):
        latents, experts = solve_flow(flow, initial_state, context, times, select, *arguments)
        canvas = context.attention_mask.bool()
        certainty = model.decode(latents).log_softmax(dim=-1).amax(dim=-1).masked_fill(~canvas, torch.inf)
        rank = certainty.argsort(dim=-1).argsort(dim=-1)
        doubtful = rank < canvas.sum(dim=-1, keepdim=True) / 2
        noise = model.config.init_noise * torch.randn(initial_state.shape, generator=generator)
        time = 2 / 3
        state = (1 - time) * torch.where(doubtful[..., None], noise, initial_state) + time * latents
        velocity = flow(state, torch.full((1,), time), context, experts=experts).velocity
        return state + (1 - time) * velocity, experts

    yan_hf.sampling.solve_flow = solve
