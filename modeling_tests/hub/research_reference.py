# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
YAN as the paper and the research checkpoints' layout describe it, plain and slow, in float64, one row at a time.

Independent of the package: it shares no code with it. A model is its research state dict and its `model_config`.
"""

import math

import torch
from testing_utils import mmd_by_loops


F = torch.nn.functional


def random_checkpoint(seed: int = 0, auto_encoder: bool = False, **changes) -> dict:
    """A checkpoint in the research layout with random float32 weights of which none is neutral."""
    config = {
        "vocab_size": 40, "d_model": 16, "max_length": 20, "attention_heads": 2, "qkv_bias": False, "dropout": 0.0,
        "encoder_n_trf_blocks": 2, "n_trf_blocks": 3, "cross_att_idx": [0, 2], "decoder_n_resi_blocks": 2,
        "latent_noise": 0.1, "init_noise": 0.8, "ode_steps": 4, "moe_n_experts": 3, "moe_gate_temperature": 0.7,
        "moe_gate_dim_multiplier": 2, "moe_sigma": 1.3, "beta_a": 1.0, "beta_b": 1.0, "encoder_use_mamba": False,
        "flow_use_mamba": False, "mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_ff_mult": 3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 4, "freeze_enc": False,
        "freeze_flow": False, "freeze_dec": True, "freeze_tok_emb": False, "freeze_pos_emb": False,
    }  # fmt: skip
    config.update(changes)
    generator = torch.Generator().manual_seed(seed)
    d, state = config["d_model"], {}

    def add(key, *shape, scale=0.3, shift=0.0):
        state[key] = scale * torch.randn(*shape, generator=generator) + shift

    def linear(key, rows, columns, bias=True):
        add(f"{key}.weight", rows, columns)
        if bias:
            add(f"{key}.bias", rows)

    def norm(key):
        add(f"{key}.scale", d, shift=1.0)
        add(f"{key}.shift", d)

    def feed_forward(key, inner, last=2):
        linear(f"{key}.layers.0", inner, d)
        linear(f"{key}.layers.{last}", d, inner)

    def attention(key):
        for name in ("W_q", "W_k", "W_v"):
            linear(f"{key}.{name}", d, d, config["qkv_bias"])
        linear(f"{key}.out_proj", d, d)

    def mixer(key):
        inner, rank, size = config["mamba_expand"] * d, math.ceil(d / 16), config["mamba_d_state"]
        for direction in ("fwd", "bwd"):
            base = f"{key}.{direction}"
            add(f"{base}.A_log", inner, size)
            add(f"{base}.D", inner)
            add(f"{base}.in_proj.weight", 2 * inner, d)
            add(f"{base}.conv1d.weight", inner, 1, config["mamba_d_conv"])
            add(f"{base}.conv1d.bias", inner)
            add(f"{base}.x_proj.weight", rank + 2 * size, inner)
            linear(f"{base}.dt_proj", inner, rank)
            add(f"{base}.out_proj.weight", d, inner)
        linear(f"{key}.proj", d, 2 * d)

    def block(part, index, mamba, cross):
        key = f"{part}.{'mamba' if mamba else 'trf'}_blocks.{index}"
        if mamba:
            mixer(f"{key}.self_mixer")
            feed_forward(f"{key}.ff", config["mamba_ff_mult"] * d, last=3)
        else:
            attention(f"{key}.self_att")
            feed_forward(f"{key}.ff", 4 * d)
        if cross:
            attention(f"{key}.cross_att")
        if part == "encoder":
            norm(f"{key}.{'norm_self' if mamba else 'norm_self_att'}")
            norm(f"{key}.norm_ff")
        else:
            linear(f"{key}.adaLN.1", (6 if cross else 4) * d, d)

    add("shared_tok_emb.weight", config["vocab_size"], d)
    add("shared_pos_emb.weight", config["max_length"] + 1, d)
    for owner in ["encoder"] if auto_encoder else ["encoder", "flow"]:
        state[f"{owner}.shared_pos_emb.weight"] = state["shared_pos_emb.weight"]
    state["encoder.shared_tok_emb.weight"] = state["shared_tok_emb.weight"]
    for index in range(config["encoder_n_trf_blocks"]):
        block("encoder", index, config["encoder_use_mamba"], False)
    norm("encoder.final_norm")
    if not auto_encoder:
        linear("flow.time_emb.1", d, d)
        for index in range(config["n_trf_blocks"]):
            block("flow", index, config["flow_use_mamba"], index in config["cross_att_idx"])
        norm("flow.final_norm")
        for k in range(config["moe_n_experts"]):
            feed_forward(f"flow.expert_out_proj.{k}", 4 * d)
        gate = config["moe_gate_dim_multiplier"] * d
        linear("flow.gate.0", gate, 3 * d)
        linear("flow.gate.2", config["moe_n_experts"], gate)
    for index in range(config["decoder_n_resi_blocks"]):
        norm(f"decoder.resi_blocks.{index}.norm")
        feed_forward(f"decoder.resi_blocks.{index}.ff", 4 * d)
    linear("decoder.lm_head", config["vocab_size"], d)
    return {"model": state, "model_config": config, "step": 17}


class Reference:
    """The model of a checkpoint. Sequences are unpadded: `(L,)` token ids, `(L, d)` latents."""

    def __init__(self, checkpoint: dict):
        self.config = checkpoint["model_config"]
        self.state = {key: value.double() for key, value in checkpoint["model"].items()}

    # Parts

    def linear(self, key, x):
        y = x @ self.state[f"{key}.weight"].T
        return y + self.state[f"{key}.bias"] if f"{key}.bias" in self.state else y

    @staticmethod
    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def normalise(x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)

    def norm(self, key, x):
        return self.state[f"{key}.scale"] * self.normalise(x) + self.state[f"{key}.shift"]

    def feed_forward(self, key, x, last=2):
        return self.linear(f"{key}.layers.{last}", self.gelu(self.linear(f"{key}.layers.0", x)))

    def attention(self, key, x, memory):
        heads = self.config["attention_heads"]
        size = x.shape[-1] // heads
        q, k, v = self.linear(f"{key}.W_q", x), self.linear(f"{key}.W_k", memory), self.linear(f"{key}.W_v", memory)
        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            outputs.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
        return self.linear(f"{key}.out_proj", torch.cat(outputs, dim=-1))

    def mamba(self, key, x):
        """Mamba-1, step by step."""
        state = self.state
        inner, size = state[f"{key}.A_log"].shape
        u, gate = (x @ state[f"{key}.in_proj.weight"].T).split(inner, dim=-1)
        kernel, width = state[f"{key}.conv1d.weight"][:, 0], self.config["mamba_d_conv"]
        convolved = torch.zeros_like(u)
        for t in range(len(x)):
            for j in range(width):
                if t - j >= 0:
                    convolved[t] += kernel[:, width - 1 - j] * u[t - j]
        u = convolved + state[f"{key}.conv1d.bias"]
        u = u * torch.sigmoid(u)
        rank = state[f"{key}.dt_proj.weight"].shape[1]
        dt, b, c = (u @ state[f"{key}.x_proj.weight"].T).split([rank, size, size], dim=-1)
        dt = torch.log1p(torch.exp(self.linear(f"{key}.dt_proj", dt)))
        a, hidden, outputs = -torch.exp(state[f"{key}.A_log"]), torch.zeros(inner, size).double(), []
        for t in range(len(x)):
            hidden = torch.exp(dt[t][:, None] * a) * hidden + dt[t][:, None] * b[t][None] * u[t][:, None]
            outputs.append(hidden @ c[t] + state[f"{key}.D"] * u[t])
        return torch.stack(outputs) * gate * torch.sigmoid(gate) @ state[f"{key}.out_proj.weight"].T

    def mixer(self, key, x):
        forward, backward = self.mamba(f"{key}.fwd", x), self.mamba(f"{key}.bwd", x.flip(0)).flip(0)
        return self.linear(f"{key}.proj", torch.cat([forward, backward], dim=-1))

    # The three networks

    def encode(self, ids):
        """`(L,)` → `(L, d)`."""
        x = self.state["shared_tok_emb.weight"][ids] + self.state["shared_pos_emb.weight"][: len(ids)]
        mamba = self.config["encoder_use_mamba"]
        for index in range(self.config["encoder_n_trf_blocks"]):
            if mamba:
                key = f"encoder.mamba_blocks.{index}"
                x = x + self.mixer(f"{key}.self_mixer", self.norm(f"{key}.norm_self", x))
                x = x + self.feed_forward(f"{key}.ff", self.norm(f"{key}.norm_ff", x), last=3)
            else:
                key = f"encoder.trf_blocks.{index}"
                normed = self.norm(f"{key}.norm_self_att", x)
                x = x + self.attention(f"{key}.self_att", normed, normed)
                x = x + self.feed_forward(f"{key}.ff", self.norm(f"{key}.norm_ff", x))
        return self.norm("encoder.final_norm", x)

    def flow(self, z, t, h):
        """State `(L, d)`, time, source latents → fields `(K, L, d)` and gate probabilities `(L, K)`."""
        d = z.shape[-1]
        frequencies = torch.exp(-torch.arange(d // 2).double() * math.log(10000) / (d // 2 - 1))
        angles = t * frequencies
        time = self.gelu(self.linear("flow.time_emb.1", torch.cat([torch.sin(angles), torch.cos(angles)])))
        x = z + self.state["shared_pos_emb.weight"][: len(z)]
        mamba = self.config["flow_use_mamba"]
        for index in range(self.config["n_trf_blocks"]):
            key = f"flow.{'mamba' if mamba else 'trf'}_blocks.{index}"
            chunks = self.linear(f"{key}.adaLN.1", self.gelu(time)).split(d)
            normed = chunks[0] * self.normalise(x) + chunks[1]
            if mamba:
                x = x + self.mixer(f"{key}.self_mixer", normed)
            else:
                x = x + self.attention(f"{key}.self_att", normed, normed)
            if index in self.config["cross_att_idx"]:
                x = x + self.attention(f"{key}.cross_att", chunks[4] * self.normalise(x) + chunks[5], h)
            normed = chunks[2] * self.normalise(x) + chunks[3]
            x = x + self.feed_forward(f"{key}.ff", normed, last=3 if mamba else 2)
        r = self.norm("flow.final_norm", x)
        count = self.config["moe_n_experts"]
        fields = torch.stack([self.feed_forward(f"flow.expert_out_proj.{k}", r) for k in range(count)])
        gate_input = torch.cat([r, h.mean(0).expand(len(z), d), time.expand(len(z), d)], dim=-1)
        logits = self.linear("flow.gate.2", self.gelu(self.linear("flow.gate.0", gate_input)))
        return fields, torch.softmax(logits / self.config["moe_gate_temperature"], dim=-1)

    def decode(self, z):
        """`(L, d)` → logits `(L, V)`."""
        for index in range(self.config["decoder_n_resi_blocks"]):
            key = f"decoder.resi_blocks.{index}"
            z = z + self.feed_forward(f"{key}.ff", self.norm(f"{key}.norm", z))
        return self.linear("decoder.lm_head", z)

    def sample(self, h, z0, experts):
        """The trajectory of the Euler steps with held experts, `(S + 1, L, d)`."""
        steps = self.config["ode_steps"] - 1
        trajectory, rows = [z0], torch.arange(len(z0))
        for step in range(steps):
            fields, _ = self.flow(trajectory[-1], step / steps, h)
            trajectory.append(trajectory[-1] + fields[experts, rows] / steps)
        return torch.stack(trajectory)

    # The loss

    def losses(self, sources, targets, times, noise, experts):
        """The seven terms for lists of rows, with all draws given: times, noise `ε`, experts of the sampler."""
        sigma, d = self.config["moe_sigma"], self.config["d_model"]
        flow, latent, token, entropy, gates, latents = [], [], [], [], [], []
        for source, target, t, eps, chosen in zip(sources, targets, times, noise, experts):
            h, z1 = self.encode(source), self.encode(target)
            z0 = self.config["init_noise"] * eps
            fields, gate = self.flow((1 - t) * z0 + t * z1, t, h)
            velocity = z1 - z0
            for i in range(len(target)):
                density = 0.0
                for k in range(len(fields)):
                    squared = ((velocity[i] - fields[k, i]) ** 2).sum()
                    normal = torch.exp(-squared / (2 * sigma**2)) / (2 * math.pi * sigma**2) ** (d / 2)
                    density = density + gate[i, k] * normal
                flow.append(-torch.log(density))
                entropy.append((gate[i] * torch.log(gate[i])).sum())
            end = self.sample(h, z0, chosen)[-1]
            latent += list(((end - z1) ** 2).sum(-1))
            token += list(-torch.log_softmax(self.decode(end), dim=-1)[torch.arange(len(target)), target])
            gates.append(gate)
            latents.append(z1)
        mean_gate, points = torch.cat(gates).mean(0), torch.cat(latents)
        return {
            "flow": torch.stack(flow).mean(),
            "latent": torch.stack(latent).mean(),
            "token": torch.stack(token).mean(),
            "gate_entropy": torch.stack(entropy).mean(),
            "load_balance": (mean_gate * torch.log(len(mean_gate) * mean_gate)).sum(),
            "mmd": torch.tensor(mmd_by_loops(points), dtype=torch.float64),
            "l2": (points**2).mean(),
        }
