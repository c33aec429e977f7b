"""CRD, Centered Reward Distillation (Zhu, Wang, Lathuiliere, Kalogeiton 2026, arXiv 2603.14128), in one file.

Fine-tune a flow-matching text-to-image model (Stable Diffusion 3.x) so that its images score higher under a
reward r(x, c). Maximising E[r] - beta KL(p || p_old) has a known optimum, and the optimum names its own
reward:

    p*(x|c) = p_old(x|c) exp(r(x,c) / beta) / Z(c)    so    r(x,c) = beta log (p*/p_old)(x|c) + beta log Z(c)

Z(c) cannot be computed, but it depends on the prompt alone. Draw K images of one prompt, subtract their mean
on both sides, and it is gone. CRD makes the model's centered log-ratio rho equal the centered reward: a
regression, with no policy gradient and no backpropagation through the sampler. The log-ratio is estimated by
the forward process: one noise, seen by the policy and by `old` alike, and the difference of their denoising
errors.

    for each epoch:
        draw K images of each prompt with `sampler`, score them, center the scores    (sample_ode, advantages)
        for each optimizer step, on its share of the prompts, and for each sigma:
            add noise; predict with the policy, with `old` and with the guided pretrained model
            loss = (centered rho - centered reward)^2 + kappa(reward) |v - v_ref|^2   (crd_loss, anchor_loss)
        let `old` and `sampler` follow the policy, each at its own pace               (decay, blend)

The three adapters are LoRA weights on one frozen model: `policy` learns, `old` is the moving reference p_old,
`sampler` draws the images. All off, it is the pretrained model, whose guided prediction anchors the policy.

    python crd.py --preset tiny        # the bundled toy model, a laptop CPU, minutes
    python crd.py --reward ocr         # Stable Diffusion 3.5 Medium learns to write, one GPU
    python crd.py --help               # every setting, each a field of `Settings` below

One process, one device: the authors train on many GPUs. A group here is always one prompt's images.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import re
import resource
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import rewards

HERE = Path(__file__).resolve().parent


@dataclass
class Settings:
    """All that a run depends on. The comments are the command line's help; a preset is a set of other
    defaults."""

    # model
    preset: str = ""                    # ocr, geneval or tiny; without it the reward decides
    model: str = "stabilityai/stable-diffusion-3.5-medium"  # a Stable Diffusion 3 pipeline, folder or repo
    dtype: str = "bf16"                 # precision of the frozen weights: bf16 or fp32 (all else is fp32)
    height: int = 512                   # image height in pixels
    width: int = 512                    # image width in pixels
    max_sequence_length: int = 128      # T5 tokens of a prompt
    rank: int = 32                      # LoRA rank
    alpha: float = 64                   # LoRA scale is alpha / rank
    lora: str = ""                      # start from the LoRA in this folder, such as runs/NAME/best

    # rollout
    reward: str = "ocr"                 # name[@path-or-repo][:weight], joined by commas (see rewards.py)
    reward_batch: int = 16              # images that a reward model is shown at once
    prompts: str = ""                   # prompt set, or a .txt or .jsonl file; without it the reward's own
    groups: int = 48                    # prompts an epoch
    group_size: int = 24                # images a prompt (K)
    rollout_steps: int = 10             # sampler steps of a rollout
    sample_batch: int = 24              # images sampled at once
    decode_batch: int = 8               # images decoded at once
    tie_sampler: bool = False           # ablation: draw the images with `old` itself

    # loss
    beta: float = 1.0                   # scale of the implicit reward beta * rho
    tau: float = math.inf               # temperature of the centering weights (inf: the plain mean)
    advantage_clip: float = 5.0         # advantages are clipped to plus and minus this (A_max)
    adaptive: bool = True               # divide each denoising error by its own detached size
    reward_weight: float = 1.0          # weight of the centered loss (0: the anchor alone)
    anchor: float = 0.1                 # kappa, the anchor's largest weight (0: no anchor)
    anchor_guidance: float = 4.5        # guidance scale of the pretrained model that anchors (1: unguided)
    anchor_adapt: str = "reward"        # what scales kappa per image: reward, advantage or off
    train_timesteps: int = 0            # sigmas a step trains on, drawn from the rollout's (0: all of them)

    # optimisation
    epochs: int = 300                   # epochs in all (0: only evaluate)
    steps_per_epoch: int = 1            # optimizer steps an epoch, each on a share of the groups
    micro_batch: int = 24               # images in a forward and backward pass (a group may be cut)
    lr: float = 3e-4                    # AdamW learning rate
    weight_decay: float = 1e-4          # AdamW weight decay
    max_grad_norm: float = 1.0          # gradient norm is clipped here
    old_decay: tuple = (0, 0.25, 0.001, 0.5)     # `old` keeps: start_step, start_value, slope, end_value
    sampler_decay: tuple = (0, 0.0, 0.001, 0.5)  # `sampler`: the same four
    grad_checkpoint: bool = True        # recompute the blocks in the backward pass, keep no activations
    compile: bool = False               # torch.compile each transformer block

    # run
    name: str = ""                      # the run's folder is runs/NAME (default: preset and seed)
    seed: int = 0                       # fixes the whole run on one device
    device: str = ""                    # cuda, cpu ... (default: cuda where there is one)
    eval_every: int = 10                # epochs between evaluations
    eval_images: int = 128              # images of held-out prompts, the same prompts and noise every time
    eval_steps: int = 40                # sampler steps of an evaluation
    eval_guidance: float = 1.0          # guidance scale of evaluations (training is always unguided)
    eval_rewards: str = ""              # rewards, as for --reward, that only judge the held-out images
    eval_prompts: str = ""              # evaluate on all prompts of this .txt or .jsonl file instead
    resume: str = ""                    # continue the run in this folder, with its settings
    wandb: str = ""                     # also log to this Weights & Biases project


PRESETS = {
    "ocr": dict(reward="ocr", steps_per_epoch=2, old_decay=(0, 0.25, 0.005, 0.999),
                sampler_decay=(75, 0.0, 0.0075, 0.999)),
    "geneval": dict(reward="geneval"),
    "tiny": dict(model=str(HERE / "tiny-sd3"), reward=f"ocr@{HERE / 'tiny-sd3'}", prompts="signs", height=32,
                 width=64, max_sequence_length=1, rank=16, alpha=32, groups=48, group_size=8,
                 sample_batch=192, decode_batch=96, micro_batch=96, train_timesteps=2, epochs=30,
                 steps_per_epoch=6, lr=1e-3, old_decay=(0, 0.25, 0.005, 0.95), anchor_guidance=4.0,
                 grad_checkpoint=False, eval_images=512, eval_steps=10, device="cpu"),
}


# ----------------------------------------------------------------------------------------------- LoRA by hand

class LoRALinear(nn.Module):
    """A frozen linear layer plus one of several low-rank updates: y = W x + (alpha / rank) B A x.

    (Hu et al. 2021, arXiv 2106.09685.) `active` names the update in use, or is None for the pretrained layer,
    to the bit. A is Gaussian and B zero, so every update starts as nothing. They are stored in float32, and
    computed with in the precision of x.
    """

    def __init__(self, base, rank, alpha, adapters):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.active = adapters[0]
        first = torch.randn(rank, base.in_features, device=base.weight.device) / rank
        zero = torch.zeros(base.out_features, rank, device=base.weight.device)
        self.A = nn.ParameterDict({name: nn.Parameter(first.clone()) for name in adapters})
        self.B = nn.ParameterDict({name: nn.Parameter(zero.clone()) for name in adapters})

    def forward(self, x):
        y = self.base(x)
        if self.active is None:
            return y
        A, B = self.A[self.active].to(x.dtype), self.B[self.active].to(x.dtype)
        return y + F.linear(F.linear(x, A), self.scale * B)


TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
           "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


def add_lora(model, targets=TARGETS, rank=32, alpha=64, adapters=("policy", "old", "sampler")):
    """Freeze `model` and put a LoRALinear in place of each linear layer whose name ends in a target.

    (`attn.to_q` is no ending of `attn2.to_q`: SD3.5's second, image-only attention stays as it is.)

    Returns {layer name: LoRALinear}. All adapters start alike; only the first is trainable. Raises ValueError
    if nothing matches.
    """
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(module, rank, alpha, adapters)
            setattr(model.get_submodule(parent), child, layers[name])
    if not layers:
        raise ValueError(f"no linear layer of {type(model).__name__} is named {' or '.join(targets)}")
    for layer in layers.values():
        for adapter in adapters[1:]:
            layer.A[adapter].requires_grad_(False)
            layer.B[adapter].requires_grad_(False)
    return layers


@contextlib.contextmanager
def use_adapter(layers, name):
    """Inside, every layer computes with adapter `name`, or as pretrained where it is None."""
    before = [layer.active for layer in layers.values()]
    for layer in layers.values():
        layer.active = name
    try:
        yield
    finally:
        for layer, active in zip(layers.values(), before):
            layer.active = active


@torch.no_grad()
def blend(layers, name, decay, source="policy"):
    """Move adapter `name` toward the policy: decay * itself + (1 - decay) * policy, A and B each."""
    for layer in layers.values():
        for weights in (layer.A, layer.B):
            weights[name].lerp_(weights[source], 1 - decay)


def save_lora(path, layers, name="policy"):
    """Write adapter `name` for diffusers' `load_lora_weights`, the scale alpha / rank folded into B."""
    tensors = {}
    for layer_name, layer in layers.items():
        tensors[f"transformer.{layer_name}.lora_A.weight"] = layer.A[name].detach().cpu()
        tensors[f"transformer.{layer_name}.lora_B.weight"] = layer.scale * layer.B[name].detach().cpu()
    write_aside(path, lambda aside: save_file(tensors, aside))


def load_lora(path, layers, name="policy"):
    """Read a file of `save_lora` into adapter `name`. ValueError if its layers or shapes are others."""
    tensors = load_file(path)
    expected = {f"transformer.{layer_name}.lora_{part}.weight" for layer_name in layers for part in "AB"}
    if tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)
        raise ValueError(f"{path} is no LoRA of these layers: {len(odd)} are on one side only, as {odd[0]}")
    for layer_name, layer in layers.items():
        for part, weights, scale in (("A", layer.A[name], 1.0), ("B", layer.B[name], layer.scale)):
            tensor = tensors[f"transformer.{layer_name}.lora_{part}.weight"]
            if tensor.shape != weights.shape:
                raise ValueError(f"{path}: {layer_name} has shape {tuple(tensor.shape)}, this run's LoRA "
                                 f"{tuple(weights.shape)}; use the same --rank")
            with torch.no_grad():
                weights.copy_(tensor / scale)


# ----------------------------------------------------------------------------- gradient checkpointing by hand

class Checkpoint(torch.autograd.Function):
    """Run a block and keep only its inputs; run it again when its gradient is asked for.

    (Chen et al. 2016, arXiv 1604.06174.) The second run uses the adapters of the first. Memory for
    activations falls from all blocks to one, for one more forward. `tensors` are the block's inputs followed
    by its trainable parameters, so that autograd sees both.
    """

    @staticmethod
    def forward(ctx, block, layers, count, *tensors):
        ctx.block, ctx.layers, ctx.count = block, layers, count
        ctx.active = [layer.active for layer in layers]
        ctx.save_for_backward(*tensors)
        return block(*tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in saved[:ctx.count]]
        now = [layer.active for layer in ctx.layers]
        for layer, active in zip(ctx.layers, ctx.active):
            layer.active = active
        with torch.enable_grad():
            outputs = ctx.block(*inputs)
        for layer, active in zip(ctx.layers, now):
            layer.active = active
        outputs, grads = zip(*[(y, g) for y, g in zip(outputs, grads) if y is not None and y.requires_grad])
        sources = [*inputs, *saved[ctx.count:]]
        wanted = [t for t in sources if t.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, None, None, *[next(found) if t.requires_grad else None for t in sources]


def checkpoint_blocks(transformer):
    """Checkpoint each of the transformer's blocks wherever gradients are recorded."""
    for block in transformer.transformer_blocks:
        layers = [m for m in block.modules() if isinstance(m, LoRALinear)]

        def forward(hidden_states, encoder_hidden_states, temb,
                    block=block, run=block.forward, layers=layers, **constants):
            if not torch.is_grad_enabled():
                return run(hidden_states, encoder_hidden_states, temb, **constants)
            run = functools.partial(run, **constants)
            parameters = [p for p in block.parameters() if p.requires_grad]
            return Checkpoint.apply(run, layers, 3, hidden_states, encoder_hidden_states, temb, *parameters)

        block.forward = forward


# ------------------------------------------------------------------------------------------------ mathematics

def add_noise(x0, noise, sigma):
    """x_sigma = (1 - sigma) x0 + sigma noise, the straight path of flow matching (Lipman et al. 2022).

    x0, noise (B, C, H, W); sigma () or (B,) in [0, 1]. Its velocity, the training target, is u = noise - x0.
    """
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


def sample_ode(velocity, noise, sigmas, order=2):
    """Integrate dx/dsigma = v from noise to an image by DPM-Solver++(2M).

    (Lu et al. 2022, arXiv 2211.01095, Alg. 2; in flow form alpha = 1 - sigma, lambda = log(alpha / sigma).)
    From s to t, x_t = D + (sigma_t / sigma_s) (x_s - D). At first order D is the data prediction x0 = x -
    sigma v; at second it is extrapolated in lambda from the last two. The first and the last step are first
    order, and so is the second where sigma starts at 1, since lambda is infinite there.

    velocity(x, sigma ()) -> (B, C, H, W); noise (B, C, H, W); sigmas (S + 1,), descending, the last one 0.
    order 1 is the Euler method. Returns x0 (B, C, H, W).
    """
    if sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must descend to 0, not {sigmas.tolist()}")
    x, before = noise, None
    log_snr = torch.log((1 - sigmas) / sigmas)
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        x0 = x - s * velocity(x, s)
        D = x0
        if order == 2 and before is not None and t > 0:
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            D = x0 + ratio / 2 * (x0 - before)
        x = D + t / s * (x - D)
        before = x0
    return x


def advantages(rewards, group_size, clip=5.0):
    """Targets s = A / (2 clip) + 1/2 in [0, 1], A = (R - mean_group R) / (std_all R + 1e-4) within +-clip.

    rewards R (N,), the images of a prompt side by side. The mean is the prompt's own, the standard deviation
    the batch's (over N): a prompt with little spread is not blown up. Raises ValueError if N is no multiple
    of group_size.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of {group_size}")
    centered = rewards.view(-1, group_size) - rewards.view(-1, group_size).mean(1, keepdim=True)
    A = centered.flatten() / (rewards.std(correction=0) + 1e-4)
    return A.clamp(-clip, clip) / (2 * clip) + 0.5


def implicit_reward(v, v_old, u, adaptive=True):
    """rho = -mean[(v - u)^2 / m - (v_old - u)^2 / m_old], one draw of log p_theta(x|c) - log p_old(x|c).

    (Paper, sec. 3.) By the ELBO a model's log-likelihood is minus its denoising error, and the two share
    sigma and noise. The adaptive weights m = mean |v - u|, at least 1e-5 and detached, put all sigmas on one
    scale (DiffusionNFT, arXiv 2509.16117). v, v_old, u (B, C, H, W) -> (B,). Zero where v = v_old.
    """
    def error(prediction):
        difference = prediction - u
        m = difference.abs().mean((1, 2, 3)).detach().clamp(min=1e-5) if adaptive else 1.0
        return difference.square().mean((1, 2, 3)) / m

    return error(v_old) - error(v)


def group_mean(x, targets, group_size, tau=math.inf):
    """The mean of x over each group, given back to each member: (1, B), or (2, B) at a finite temperature.

    Then the mean is weighted twice, by softmax(s / tau) and by softmax(-s / tau): the group is centered once
    on its best images and once on its worst. x and targets s (B,), groups side by side.
    """
    s = targets.view(-1, group_size)
    logits = torch.zeros_like(s)[None] if tau == math.inf else torch.stack([s, -s]) / tau
    mean = (logits.softmax(-1) * x.view(-1, group_size)).sum(-1, keepdim=True)
    return mean.expand(-1, -1, group_size).flatten(1)


def crd_loss(rho, targets, group_size, beta=1.0, tau=math.inf, clip=5.0, rho_mean=None):
    """(A_max / beta) mean_i (beta (rho_i - sg(mean_group rho)) - (s_i - mean_group s))^2.

    The paper's centered loss. rho (B,), one implicit reward an image; targets s (B,) of `advantages`; B whole
    groups side by side -> scalar. With the plain mean (tau = inf), detaching the mean of rho changes no
    gradient: the centered terms it multiplies sum to zero over a group. At a finite tau the two directions of
    `group_mean` are averaged.

    A part of a group must still be centered on the whole of it: give rho_mean (D, B), the part's columns of
    `group_mean(rho)` from a pass over the whole group, and targets (D, B) with their own `group_mean`
    subtracted.
    """
    if rho_mean is None:
        if len(rho) % group_size:
            raise ValueError(f"{len(rho)} images are not whole groups of {group_size}: give rho_mean")
        rho_mean = group_mean(rho.detach(), targets, group_size, tau)
        targets = targets - group_mean(targets, targets, group_size, tau)
    return clip / beta * (beta * (rho - rho_mean) - targets).square().mean()


def anchor_loss(v, v_ref, normalized_reward, kappa, kappa_min=1e-4):
    """mean_i kappa_i mean_chw (v - v_ref)^2, with kappa_i = kappa_min + n_i (kappa - kappa_min).

    The KL to the guided pretrained model, up to sigma's weight. v, v_ref (B, C, H, W); normalized_reward n
    (B,) in [0, 1], or None for kappa everywhere. The anchor is weak on images of low reward, which have
    everything to learn, and strong on those that could start to cheat.
    """
    kappa_min = min(kappa_min, kappa)
    strength = kappa if normalized_reward is None else kappa_min + normalized_reward * (kappa - kappa_min)
    return (strength * (v - v_ref).square().mean((1, 2, 3))).mean()


def decay(step, start_step, start_value, slope, end_value):
    """How much of itself an adapter keeps in a blend after optimizer step `step`: a ramp to end_value."""
    return start_value if step < start_step else min(start_value + slope * (step - start_step), end_value)


# --------------------------------------------------------------------------------------- the model's two ends

def load_pipeline(s, device):
    """The pretrained pipeline, frozen: transformer and VAE on the device, text encoders on the CPU."""
    from diffusers import StableDiffusion3Pipeline
    # What model_index.json holds as null must be passed as None, or from_pretrained looks for it.
    absent = {name: None for name, kind in StableDiffusion3Pipeline.load_config(s.model).items()
              if isinstance(kind, (list, tuple)) and kind[0] is None}
    dtype = {"default": {"bf16": torch.bfloat16, "fp32": torch.float32}[s.dtype], "vae": torch.float32}
    pipe = StableDiffusion3Pipeline.from_pretrained(s.model, dtype=dtype, low_cpu_mem_usage=False, **absent)
    for module in (pipe.transformer, pipe.vae, *text_encoders(pipe)):
        module.requires_grad_(False).eval()
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


def text_encoders(pipe):
    return [m for m in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if m is not None]


@torch.no_grad()
def encode(pipe, prompts, s, device):
    """N prompts to (embeddings (N, L, D), pooled (N, P)). The text encoders visit the device for it."""
    for module in text_encoders(pipe):
        module.to(device)
    parts = [pipe.encode_prompt(list(prompts[i:i + 16]), None, None, device=device,
                                do_classifier_free_guidance=False, max_sequence_length=s.max_sequence_length)
             for i in range(0, len(prompts), 16)]
    for module in text_encoders(pipe):
        module.to("cpu")
    return torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])


@torch.no_grad()
def decode(vae, latents, batch):
    """Latents (N, C, h, w) to a list of N PIL images."""
    images = []
    for z in latents.split(batch):
        x = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
        x = (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        images += [Image.fromarray(pixels) for pixels in x]
    return images


def latent_shape(pipe, s):
    """(C, h, w) of one image's latents."""
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, s.height // scale, s.width // scale


def velocity(transformer, x, sigma, cond, empty=None, guidance=1.0):
    """v(x, sigma, c), or with guidance v(empty) + guidance (v(c) - v(empty)) (Ho and Salimans 2022).

    x (B, C, H, W) float32; sigma (); cond = (embeddings (B, L, D), pooled (B, P)); empty is one prompt's.
    """
    if guidance != 1.0:
        both = [torch.cat([e.expand_as(c), c]) for e, c in zip(empty, cond)]
        v_empty, v_cond = velocity(transformer, torch.cat([x, x]), sigma, both).chunk(2)
        return v_empty + guidance * (v_cond - v_empty)
    timestep = (1000 * sigma).expand(len(x))
    return transformer(x.to(transformer.dtype), cond[0], cond[1], timestep, return_dict=False)[0].float()


@torch.no_grad()
def generate(transformer, noise, sigmas, cond, batch, empty=None, guidance=1.0, label="sample"):
    """Noise (N, C, h, w) and the conditions of P prompts to latents x0 (N, C, h, w), N / P images of each."""
    latents, K = [], len(noise) // len(cond[0])
    for rows in tqdm(torch.arange(len(noise)).split(batch), desc=label, leave=False):
        here = [t[rows // K] for t in cond]
        latents.append(sample_ode(lambda x, sigma: velocity(transformer, x, sigma, here, empty, guidance),
                                  noise[rows], sigmas))
    return torch.cat(latents)


def scheduler_sigmas(scheduler, steps, device):
    """The pretrained model's own noise levels for a run of `steps`: (steps + 1,), from 1 down to 0."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.to(device, torch.float32)


# -------------------------------------------------------------------------------------------- a training step

def accumulate_gradients(transformer, layers, batch, sigma, noise, s, weight):
    """Add to the policy's gradients those of the CRD objective at one sigma, for whole groups of images.

    `batch` holds x0 (N, C, h, w), targets (N,), strength (N,) or None, cond for the N / K prompts, and empty.
    A micro-batch is some whole groups or a part of one. Where groups are cut, a pass without gradients gives
    rho's mean over the whole group first. Gradients, and the returned means over images of (loss, centered
    loss, anchor, rho, rho squared), are times `weight`.
    """
    K, N, targets, total = s.group_size, len(batch["x0"]), batch["targets"], torch.zeros(5)
    centered = targets - group_mean(targets, targets, K, s.tau)  # (D, N)
    x, u = add_noise(batch["x0"], noise, sigma), noise - batch["x0"]

    def predict(rows, adapter, guidance=1.0, grad=False):
        cond = [t[rows // K] for t in batch["cond"]]
        plain = grad and x.device.type == "cpu"  # there, fused attention is three times as slow in backward
        attention = sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
        with use_adapter(layers, adapter), torch.set_grad_enabled(grad), attention:
            return velocity(transformer, x[rows], sigma, cond, batch["empty"], guidance)

    # A block is whole groups: as many as fit in a micro-batch, or one, cut into several parts.
    for block in torch.arange(N).split(max(s.micro_batch // K, 1) * K):
        parts = block.split(s.micro_batch)
        if s.reward_weight:
            v_old, rho_mean = torch.cat([predict(rows, "old") for rows in parts]), None
            if len(parts) > 1:
                v = torch.cat([predict(rows, "policy") for rows in parts])
                rho = implicit_reward(v, v_old, u[block], s.adaptive)
                rho_mean = group_mean(rho, targets[block], K, s.tau)
        for rows in parts:
            v = predict(rows, "policy", grad=True)
            reward_loss = anchor = rho = torch.zeros((), device=v.device)
            if s.reward_weight:
                here = rows - block[0]
                rho = implicit_reward(v, v_old[here], u[rows], s.adaptive)
                center = (targets[rows], None) if len(parts) == 1 else (centered[:, rows], rho_mean[:, here])
                reward_loss = crd_loss(rho, center[0], K, s.beta, s.tau, s.advantage_clip, center[1])
            if s.anchor:
                v_ref = predict(rows, None, s.anchor_guidance)
                strength = None if batch["strength"] is None else batch["strength"][rows]
                anchor = anchor_loss(v, v_ref, strength, s.anchor)
            loss = s.reward_weight * reward_loss + anchor
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at sigma {sigma.item():.3f}")
            share = weight * len(rows) / N
            (share * loss).backward()
            values = torch.stack([loss, reward_loss, anchor, rho.mean(), rho.square().mean()])
            total += share * values.detach().cpu()
    return total


# -------------------------------------------------------------------------------------------- data in and out

def write_aside(path, write):
    """Call write(aside) on a path beside `path`, then rename: a killed save leaves the previous file."""
    aside = f"{path}.aside"
    write(aside)
    os.replace(aside, path)


def save(run, name):
    """Write a checkpoint, runs/NAME/last or best: the LoRA for diffusers, and all that --resume needs."""
    folder = run.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {layer_name: {key: v for key, v in layer.state_dict().items() if not key.startswith("base.")}
                for layer_name, layer in run.layers.items()}
    state = dict(adapters=adapters, optimizer=run.optimizer.state_dict(), progress=run.progress,
                 rng=run.generator.get_state())
    write_aside(folder / "state.pt", lambda aside: torch.save(state, aside))
    save_lora(folder / "pytorch_lora_weights.safetensors", run.layers)


def restore(run, name):
    """The reverse of `save`. Lines of metrics.jsonl that training will write again go."""
    state = torch.load(run.folder / name / "state.pt", map_location="cpu", weights_only=True)
    for layer_name, layer in run.layers.items():
        layer.load_state_dict(state["adapters"][layer_name], strict=False)  # the frozen base is not in it
    run.optimizer.load_state_dict(state["optimizer"])
    run.optimizer.param_groups[0].update(lr=run.s.lr, weight_decay=run.s.weight_decay)  # flags may differ
    run.generator.set_state(state["rng"])
    run.progress.update(state["progress"])
    run.stream = itertools.islice(run.stream, run.progress["prompts"], None)
    if not run.s.epochs:
        return
    lines = [m for m in read_metrics(run.folder)
             if m["epoch"] < run.progress["epoch"] or m["split"] == "test"]
    write_aside(run.folder / "metrics.jsonl",
                lambda aside: Path(aside).write_text("".join(json.dumps(m) + "\n" for m in lines)))


def contact_sheet(path, images, captions, columns=4):
    """Images in a grid, each over its caption, small ones enlarged without smoothing."""
    scale = max(1, 256 // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    font, line = ImageFont.load_default(size=13), 18
    captions = [textwrap.wrap(caption, width // 7)[:3] for caption in captions]
    cell = height + line * max(map(len, captions)) + 10
    sheet = Image.new("RGB", (columns * (width + 8), -(-len(images) // columns) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, captions)):
        x, y = i % columns * (width + 8), i // columns * cell
        sheet.paste(image.resize((width, height), Image.NEAREST), (x, y))
        pen.multiline_text((x + 4, y + height + 2), "\n".join(lines), fill="black", font=font)
    write_aside(path, lambda aside: sheet.save(aside, format="PNG"))


COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#475569", "#dc2626")


def plot(path, curves, ylabel="reward", xlabel="images scored", levels=None, size=(900, 560)):
    """A line chart, drawn with Pillow: curves {label: [runs]}, a run a list of (x, y); levels {label: y}.

    Several runs of one label share a color: the thin lines are the runs, the thick one is their mean.
    """
    runs = [run for group in curves.values() for run in group]
    levels = levels or {}
    ys = [y for run in runs for _, y in run] + list(levels.values())
    low, high, right = min(ys), max(ys), max(x for run in runs for x, _ in run) or 1
    step = 10 ** math.floor(math.log10(max(high - low, 1e-6)))
    step = next(step * m for m in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * m) <= 8)
    low, high = math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step
    S = 2  # draw twice as large, then shrink: smooth lines
    image = Image.new("RGB", (size[0] * S, size[1] * S), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=15 * S)
    left, top, w, h = 70 * S, 20 * S, (size[0] - 100) * S, (size[1] - 80) * S
    at = lambda x, y: (left + w * x / right, top + h * (high - y) / (high - low or 1))  # noqa: E731
    for i in range(round((high - low) / step) + 1):
        y = low + i * step
        pen.line([at(0, y), at(right, y)], fill="#e2e8f0", width=S)
        pen.text((left - 8 * S, at(0, y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm")
    for i in range(5):
        x = right * i / 4
        pen.text((at(x, low)[0], top + h + 8 * S), f"{x:,.0f}", fill="black", font=font, anchor="mt")
    caption = f"{ylabel}, against {xlabel}"
    pen.text((left + w / 2, top + h + 32 * S), caption, fill="black", font=font, anchor="mt")
    legend = []
    for color, (label, group) in zip(itertools.cycle(COLORS), curves.items()):
        for run in group:
            pen.line([at(*p) for p in run], fill=color, width=S)
        mean = [[sum(values) / len(group) for values in zip(*points)] for points in zip(*group)]
        pen.line([at(*p) for p in mean], fill=color, width=3 * S)
        legend.append((label, color))
    for color, (label, y) in zip(reversed(COLORS), levels.items()):
        for x in range(0, 50):
            pen.line([at(right * x / 50, y), at(right * (x + 0.6) / 50, y)], fill=color, width=2 * S)
        legend.append((label, color))
    wide, tall = max(font.getlength(label) for label, _ in legend) + 60 * S, len(legend) * 24 * S
    pen.rectangle([left + 8 * S, top + 6 * S, left + 8 * S + wide, top + 6 * S + tall], fill="white")
    for i, (label, color) in enumerate(legend):  # in the top left corner: rewards rise
        x, y = left + 16 * S, top + 18 * S + i * 24 * S
        pen.line([(x, y), (x + 30 * S, y)], fill=color, width=4 * S)
        pen.text((x + 38 * S, y), label, fill="black", font=font, anchor="lm")
    write_aside(path, lambda aside: image.resize(size, Image.LANCZOS).save(aside, format="PNG"))


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, a list of dicts."""
    path = Path(folder, "metrics.jsonl")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]  # not a line cut by a kill


def reward_curve(folder, split="eval", x="images"):
    """A run's points (images scored, mean reward) for `plot`, or with x="seconds" (time spent, reward)."""
    return [(m[x], m["reward"]) for m in read_metrics(folder) if m["split"] == split]


# Dense bf16 peaks by the vendor's data sheets, for the MFU.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}


def count_flops(transformer, shape, cond):
    """Floating-point operations of one forward pass for one image, counted, not estimated."""
    from torch.utils.flop_counter import FlopCounterMode
    sigma = torch.ones((), device=cond[0].device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        velocity(transformer, torch.zeros(1, *shape, device=sigma.device), sigma, [t[:1] for t in cond])
    return counter.get_total_flops()


def peak_memory(device):
    """The most memory held so far, in GB (1e9 bytes): of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Clock:
    """Seconds spent in each phase: `with clock("sample"): ...`, GPU work included."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def __call__(self, phase):
        start = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


# ---------------------------------------------------------------------------------------------------- the run

@dataclass
class Run:
    """What a run holds while it goes on."""

    s: Settings
    folder: Path
    reward: rewards.Reward
    judge: Any                  # the rewards of --eval-rewards, or None
    stream: Iterator            # endless (prompt, metadata) to train on
    held_out: tuple             # prompts, metadata, conditions to evaluate on
    empty: tuple                # the empty prompt's conditions, for guidance
    pipe: Any                   # the pretrained pipeline, with LoRA layers in its transformer
    layers: dict                # those LoRALinear, by name
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # draws everything that is random after the prompts
    flops: int                  # floating-point operations of one image's forward pass
    progress: dict              # epoch, step, prompts, images, seconds and best reward so far


def validate(s):
    """Refuse settings that contradict each other, in one line."""
    for name, choices in (("dtype", ("bf16", "fp32")), ("anchor_adapt", ("reward", "advantage", "off"))):
        if getattr(s, name) not in choices:
            flag = f"--{name.replace('_', '-')}"
            raise SystemExit(f"{flag} {getattr(s, name)}: choose from {', '.join(choices)}")
    for name in ("groups", "group_size", "rollout_steps", "sample_batch", "decode_batch", "steps_per_epoch",
                 "micro_batch", "eval_every", "eval_images", "eval_steps", "rank", "reward_batch"):
        if getattr(s, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    if s.groups % s.steps_per_epoch:
        raise SystemExit(f"--groups {s.groups} is no multiple of --steps-per-epoch {s.steps_per_epoch}: each "
                         "step takes an equal share of the groups")
    if not 0 <= s.train_timesteps <= s.rollout_steps:
        raise SystemExit(f"--train-timesteps {s.train_timesteps}: they are drawn from the {s.rollout_steps} "
                         "of --rollout-steps (0: all of them)")
    for name in ("beta", "tau", "advantage_clip"):
        if not getattr(s, name) > 0:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(s, name)}: must be positive")
    if s.group_size < 2 and s.reward_weight:
        raise SystemExit(f"--group-size {s.group_size}: an image alone is its own mean; give at least two")
    if not s.reward_weight and not s.anchor:
        raise SystemExit("--reward-weight 0 --anchor 0: nothing is left to learn from")


def prepare(s):
    """Load and check all that a run needs. A user's mistake is a SystemExit of one line."""
    validate(s)
    device = torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(s.resume or Path("runs", s.name))
    if (folder / "metrics.jsonl").exists() and not s.resume:
        raise SystemExit(f"{folder} holds a run: choose another --name, or go on with --resume {folder}")
    if device.type == "cpu" and not s.device and not Path(s.model).exists():
        raise SystemExit(f"{s.model} needs a CUDA device, and there is none here. Try `python crd.py "
                         "--preset tiny`, the bundled model for CPUs (or insist with --device cpu)")
    try:
        source = s.prompts or rewards.default_prompts(s.reward)
        stream = rewards.prompts(source, "train", s.seed)
        held_out = itertools.cycle(rewards.prompts(source, "eval", s.seed))
        prompts, metadata = zip(*(rewards.read_prompt_file(s.eval_prompts) if s.eval_prompts else
                                  itertools.islice(held_out, s.eval_images)))
        reward = rewards.load(s.reward, device, s.reward_batch)
        judge = rewards.load_unseen(s.eval_rewards, s.reward, device, s.reward_batch)
        if s.epochs:
            rewards.check(reward, source)
        for scorer in filter(None, (reward, judge)):
            scorer.check(prompts, metadata)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error

    try:
        pipe = load_pipeline(s, device)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise SystemExit(f"error: cannot load {s.model} ({cause}). If its weights are gated, accept the "
                         f"licence on https://huggingface.co/{s.model} and run `hf auth login`; or try "
                         "`python crd.py --preset tiny`, the bundled model") from None

    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")
    held_out, empty = encode(pipe, prompts, s, device), encode(pipe, [""], s, device)
    flops = count_flops(pipe.transformer, latent_shape(pipe, s), empty)
    layers = add_lora(pipe.transformer, TARGETS, s.rank, s.alpha)
    if s.lora and not s.resume:
        try:
            for name in ("policy", "old", "sampler"):
                load_lora(Path(s.lora, "pytorch_lora_weights.safetensors"), layers, name)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--lora {s.lora}: {error}") from None
    if s.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each adapter, with and without gradients
        for block in pipe.transformer.transformer_blocks:
            block.forward = torch.compile(block.forward)
    if s.grad_checkpoint:
        checkpoint_blocks(pipe.transformer)
    optimizer = torch.optim.AdamW([p for p in pipe.transformer.parameters() if p.requires_grad], lr=s.lr,
                                  betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay)
    run = Run(s, folder, reward, judge, stream, (prompts, metadata, held_out), empty, pipe, layers, optimizer,
              torch.Generator(device).manual_seed(s.seed), flops,
              {"epoch": 0, "step": 0, "prompts": 0, "images": 0, "seconds": 0.0, "best": -math.inf})
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if s.resume:
        try:
            restore(run, "last")
        except (FileNotFoundError, RuntimeError) as error:
            cause = str(error).strip().splitlines()[0]
            raise SystemExit(f"error: cannot resume {folder} ({cause}): it needs last/state.pt, of the same "
                             "model and --rank") from None
    elif s.epochs:
        save(run, "last")
    if s.epochs or not s.resume:
        text = json.dumps(asdict(s), indent=2)
        write_aside(folder / "args.json", lambda aside: Path(aside).write_text(text))
    if s.wandb:
        import wandb
        wandb.init(project=s.wandb, name=folder.name, config=asdict(s))
    return run


def train(s):
    """The paper's Algorithm 1. Returns the run's folder."""
    run = prepare(s)
    vae, transformer, device, progress = run.pipe.vae, run.pipe.transformer, run.pipe.vae.device, run.progress
    K, N = s.group_size, s.groups * s.group_size
    T = s.train_timesteps or s.rollout_steps
    shape = latent_shape(run.pipe, s)
    sigmas = scheduler_sigmas(run.pipe.scheduler, s.rollout_steps, device)
    parameters = run.optimizer.param_groups[0]["params"]

    for epoch in range(progress["epoch"], s.epochs):
        if epoch % s.eval_every == 0:
            evaluate(run, epoch)
        clock = Clock(device)

        with clock("sample"):  # 1. roll out: K images of each prompt, unguided
            prompts, metadata = zip(*itertools.islice(run.stream, s.groups))
            cond = encode(run.pipe, prompts, s, device)
            noise = torch.randn(N, *shape, generator=run.generator, device=device)
            with use_adapter(run.layers, "old" if s.tie_sampler else "sampler"):
                x0 = generate(transformer, noise, sigmas, cond, s.sample_batch)
            images = decode(vae, x0, s.decode_batch)

        with clock("reward"):  # 2. score
            R, parts = run.reward.score(images, repeat(prompts, K), repeat(metadata, K))
            targets = advantages(R, K, s.advantage_clip).to(device)
            strength = {"reward": rewards.normalize(R, run.reward.range).to(device), "advantage": targets,
                        "off": None}[s.anchor_adapt]

        with clock("train"):  # 3. train
            totals = torch.zeros(6)  # loss, centered loss, anchor, rho, rho squared, gradient norm
            shares = torch.arange(N).split(s.groups // s.steps_per_epoch * K)
            for share in tqdm(shares, desc="train", leave=False):
                batch = {"x0": x0[share], "cond": [t[share[::K] // K] for t in cond], "empty": run.empty,
                         "targets": targets[share], "strength": None if strength is None else strength[share]}
                for i in torch.randperm(s.rollout_steps, generator=run.generator, device=device)[:T]:
                    noise = torch.randn(batch["x0"].shape, generator=run.generator, device=device)
                    totals[:5] += accumulate_gradients(transformer, run.layers, batch, sigmas[i], noise, s,
                                                       weight=1 / T)
                grad_norm = nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
                if not grad_norm.isfinite():
                    raise FloatingPointError(f"the gradient norm is {grad_norm.item()}")
                run.optimizer.step()  # 4. step
                run.optimizer.zero_grad()
                totals[5] += grad_norm.cpu()
                progress["step"] += 1

        blend(run.layers, "old", decay(progress["step"], *s.old_decay))  # 5. blend
        blend(run.layers, "sampler", decay(progress["step"], *s.sampler_decay))
        seconds = sum(clock.seconds.values())
        for key, more in {"epoch": 1, "prompts": s.groups, "images": N, "seconds": seconds}.items():
            progress[key] += more
        report(run, clock.seconds, R, parts, totals / s.steps_per_epoch)
        save(run, "last")
    evaluate(run, progress["epoch"])
    return run.folder


def repeat(items, K):
    """Each item K times in a row."""
    return [item for item in items for _ in range(K)]


def evaluate(run, epoch):
    """Draw the held-out prompts with the policy, always from the same noise; score, log and show them."""
    s, (prompts, metadata, cond), vae = run.s, run.held_out, run.pipe.vae
    generator = torch.Generator().manual_seed(1234)
    noise = torch.randn(len(prompts), *latent_shape(run.pipe, s), generator=generator)
    sigmas = scheduler_sigmas(run.pipe.scheduler, s.eval_steps, vae.device)
    with use_adapter(run.layers, "policy"):
        latents = generate(run.pipe.transformer, noise.to(vae.device), sigmas, cond, s.sample_batch,
                           run.empty, s.eval_guidance, "evaluate")
    images = decode(vae, latents, s.decode_batch)
    R, parts = run.reward.score(images, prompts, metadata)
    unseen, tables = judged(run, images, parts)
    captions = [f"{prompt}  {reward:.2f}" for prompt, reward in zip(prompts, R.tolist())]
    split = "test" if s.resume and not s.epochs else "eval"  # a look at a run is no part of its curve
    name = f"epoch-{epoch:04d}" if split == "eval" else "test"
    contact_sheet(run.folder / "samples" / f"{name}.png", images[:16], captions[:16])
    log(run, split=split, epoch=epoch, **rewards_of(run, R, {**parts, **unseen}), **tables)
    if split == "eval":
        curves = {split: [reward_curve(run.folder, split)] for split in ("train", "eval")}
        curves = {split: runs for split, runs in curves.items() if runs[0]}
        plot(run.folder / "curve.png", curves, run.reward.name)
    others = "".join(f"  {name} {scores.mean():.4f}" for name, scores in unseen.items())
    tqdm.write(f"epoch {epoch:4d}  held-out {run.reward.name} {R.mean():.4f}{others}")
    for table, rows in tables.items():
        tqdm.write(f"            {table}: " + "  ".join(f"{row} {value:.3f}" for row, value in rows.items()))
    if s.epochs and R.mean() > run.progress["best"]:
        run.progress["best"] = R.mean().item()
        save(run, "best")
        save(run, "last")  # so that a resumed run knows what it has to beat


def judged(run, images, parts):
    """What --eval-rewards make of the held-out images, {name: (B,)}, and the tables of benchmarks that were
    run, {"geneval details": {row: value}}. A name that is in `parts` already is marked."""
    prompts, metadata, _ = run.held_out
    scorers = [run.reward] + [run.judge] * bool(run.judge)
    unseen = run.judge.score(images, prompts, metadata)[1] if run.judge else {}
    unseen = {name + " (unseen)" * (name in parts): scores for name, scores in unseen.items()}
    tables = [item for scorer in scorers for item in rewards.tables(scorer).items()]
    return unseen, {f"{name} details": rows for name, rows in tables}


def rewards_of(run, R, parts):
    """What a line of metrics.jsonl says of rewards: the whole, its spread over images, and its parts."""
    return {**{key: run.progress[key] for key in ("step", "images", "seconds")},
            "reward": R.mean().item(), "reward_std": R.std(correction=0).item(),
            **{name: part.mean().item() for name, part in parts.items()}}


def report(run, seconds, R, parts, totals):
    """Log a training epoch and print its line. Every run is its own benchmark.

    Model FLOPs: a forward pass an image and rollout step; in training, the policy's forward and its backward
    (which costs one more: frozen weights need no gradient), `old`, the reference, twice where it is guided,
    and the policy once more where groups are cut. Recomputation does not count.
    """
    s, (loss, centered, anchor, rho, rho_squared, grad_norm) = run.s, totals.tolist()
    T = s.train_timesteps or s.rollout_steps
    reference = bool(s.anchor) * (1 + (s.anchor_guidance != 1))
    reward = bool(s.reward_weight) * (1 + (s.micro_batch < s.group_size))
    passes = s.rollout_steps + T * (2 + reward + reference)
    tflops = len(R) * passes * run.flops / (seconds["sample"] + seconds["train"]) / 1e12
    rate, device, epoch = len(R) / sum(seconds.values()), run.pipe.vae.device, run.progress["epoch"] - 1
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu and s.dtype == "bf16"), None)
    mfu = tflops / peak if peak else None
    log(run, split="train", epoch=epoch, **rewards_of(run, R, parts), loss=loss, centered_loss=centered,
        anchor=anchor, rho=rho, rho_std=max(rho_squared - rho**2, 0) ** 0.5, grad_norm=grad_norm,
        **{f"{phase}_seconds": t for phase, t in seconds.items()}, images_per_second=rate, tflops=tflops,
        mfu=mfu, peak_gb=peak_memory(device))
    phases = " ".join(f"{phase} {t:.1f}s" for phase, t in seconds.items())
    tqdm.write(f"epoch {epoch:4d}  reward {R.mean():.4f}  loss {loss:.4f}  grad {grad_norm:.3f}  |  {phases}"
               f"  {rate:.1f} img/s  {tflops:.2f} TFLOP/s" + (f" ({mfu:.0%} MFU)" if mfu else "")
               + f"  {peak_memory(device):.1f} GB")


def log(run, **line):
    """Append a line to metrics.jsonl, and send it to Weights & Biases with --wandb."""
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if run.s.wandb:
        import wandb
        wandb.log({f"{line['split']}/{key}": value for key, value in line.items() if key != "split"})


# ------------------------------------------------------------------------------------------- the command line

def parse(argv=None):
    """The command line to Settings: a preset's defaults, or a resumed run's, then the flags given."""
    help_text = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Settings), re.M))
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        flag, text = "--" + field.name.replace("_", "-"), help_text[field.name]
        text += f" [{field.default}]" if field.default != "" else ""
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif field.type is tuple:
            parser.add_argument(flag, nargs=4, type=float, metavar=("STEP", "VALUE", "SLOPE", "END"),
                                help=text)
        else:
            parser.add_argument(flag, type=field.type, metavar=field.name.split("_")[-1].upper(), help=text)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        path = Path(given["resume"], "args.json")
        if not path.exists():
            raise SystemExit(f"--resume {path.parent}: no {path}; give a run's folder, such as runs/NAME")
        defaults = json.loads(path.read_text())
        if defaults.keys() - help_text.keys():
            raise SystemExit(f"--resume {path.parent}: it is no run of crd.py")
        if "lora" in given:
            raise SystemExit(f"--resume {path.parent} has a LoRA of its own; --lora starts a new run")
    else:
        schedule = "ocr" if given.get("reward", "ocr").startswith("ocr") else "geneval"
        preset = given.setdefault("preset", schedule)
        if preset not in PRESETS:
            raise SystemExit(f"--preset {preset}: no such preset; choose from {', '.join(PRESETS)}")
        defaults = PRESETS[preset]
    s = Settings(**{**defaults, **given})
    s.name = s.name or f"{s.preset}-seed{s.seed}"
    return s


def main():
    """Train, and leave in one line where that is all a user needs to know."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    s = parse()
    folder = Path(s.resume or Path("runs", s.name))
    try:
        train(s)
    except (KeyboardInterrupt, FloatingPointError) as stop:
        what = f"{stop}: stopped before the optimizer step, try a smaller --lr" if str(stop) else "stopped"
        kept = f"; the finished epochs are kept: --resume {folder}" if (folder / "last").exists() else ""
        raise SystemExit(what + kept) from None


if __name__ == "__main__":
    main()
