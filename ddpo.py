"""DDPO, Denoising Diffusion Policy Optimization (Black et al. 2023, arXiv 2305.13301), in one file.

Fine-tune a text-to-image model so that its images score higher under a reward r(x, c), by taking its sampler
for what it is: a policy. Denoising is a Markov decision process of T steps,

    state (c, t, x_t)        action x_{t-1}        reward r(x_0, c) after the last step, 0 before it

and the policy is the sampler's own step, a Gaussian: p(x_{t-1} | x_t, c) = N(mean(x_t, t, c), std_t^2).
Nobody can say how likely an image is; how likely each step to it was is exact, and a policy gradient needs no
more:

    grad E[r] ~ E_old[ sum_t A grad log p(x_{t-1} | x_t, c) ]          the score function estimator, `sf`
              ~ E_old[ sum_t A grad (p / p_old)(x_{t-1} | x_t, c) ]    importance sampling, `is`

A is the advantage: the reward less the prompt's mean, over its standard deviation. Images come from p_old.
`sf` holds while the policy is still p_old, so it allows one update for an epoch's images. `is` corrects each
step for the difference, and allows several updates while the ratio p / p_old stays near 1: there it is
clipped, as in PPO. Gradients are taken one step at a time, never through the chain, so memory does not grow
with T.

    for each epoch:
        draw images with the stochastic sampler; keep x_T ... x_0 and log p_old of its steps         (rollout)
        score them, and turn rewards into advantages                                        (PromptStatistics)
        for each update, on its share of the images, and for each random step:       (policy_gradients)
            log p of that same step under the policy as it is now                   (ddim_step, flow_sde_step)
            loss = max(-A ratio, -A clipped ratio)         (importance_sampling_loss, or score_function_loss)

The paper's baselines are here too: `rwr` and `rwr-sparse` train the denoising loss on the model's own images,
weighted by reward or on the best of them alone (regression_gradients). One loop serves UNets (Stable
Diffusion 1.x, the step of DDIM) and Stable Diffusion 3.x (a flow's SDE): see StableDiffusion and
StableDiffusion3.

    python ddpo.py --preset tiny                  # the bundled toy model, a laptop CPU
    python ddpo.py --reward compressibility       # Stable Diffusion 1.4 learns to compress well, one GPU
    python ddpo.py --help                         # every setting, each a field of `Settings` below

One process, one device: the authors train on many.
"""

import argparse
import contextlib
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
from collections import defaultdict, deque
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
    preset: str = ""                    # compressibility, aesthetic, alignment, tiny (default: by reward)
    model: str = "CompVis/stable-diffusion-v1-4"  # a Stable Diffusion 1.x or 3.x pipeline, folder or repo
    dtype: str = "bf16"                 # precision of the frozen weights: bf16 or fp32 (all else is fp32)
    height: int = 512                   # image height in pixels
    width: int = 512                    # image width in pixels
    max_sequence_length: int = 128      # T5 tokens of a prompt (Stable Diffusion 3 only)
    rank: int = 16                      # LoRA rank
    alpha: float = 32                   # LoRA scale is alpha / rank
    lora: str = ""                      # start from the LoRA in this folder, such as runs/NAME/best

    # rollout
    reward: str = "compressibility"     # name[@path-or-repo][:weight], joined by commas (see rewards.py)
    reward_batch: int = 16              # images that a reward model is shown at once
    prompts: str = ""                   # prompt set, or a .txt or .jsonl file; without it the reward's own
    images: int = 256                   # images an epoch
    group_size: int = 1                 # images a prompt in an epoch (1: each image draws its own)
    steps: int = 0                      # denoising steps (0: 50, or 10 for Stable Diffusion 3)
    random_steps: int = 0               # the first are random, the rest an ODE (0: all; SD 3: all but one)
    guidance: float = 0.0               # guidance scale, in training too (0: 5, or 4.5 for SD 3; 1: none)
    eta: float = 1.0                    # noise of DDIM's step (Stable Diffusion 1.x)
    noise_level: float = 0.7            # noise of the flow's SDE step (Stable Diffusion 3)
    batch: int = 8                      # images in a forward pass, in sampling as in training
    decode_batch: int = 8               # images decoded at once

    # loss
    algorithm: str = "is"               # is, sf, rwr or rwr-sparse
    updates: int = 0                    # optimizer steps an epoch, each on a share of the images (0: 4, sf 1)
    clip: float = 1e-4                  # is: the ratio is clipped to 1 plus and minus this
    advantage_clip: float = 5.0         # advantages are clipped to plus and minus this
    stat_buffer: int = 32               # rewards remembered of each prompt, for its mean and deviation
    stat_min: int = 16                  # with fewer than this the batch's are used
    temperature: float = 0.2            # rwr: weights are softmax(advantage / temperature)
    keep: float = 0.1                   # rwr-sparse: share of the images that is trained on
    train_timesteps: int = 0            # random steps an update trains on (0: all); rwr: noises an image

    # optimisation
    epochs: int = 100                   # epochs in all (0: only evaluate)
    lr: float = 3e-4                    # AdamW learning rate
    weight_decay: float = 1e-4          # AdamW weight decay
    max_grad_norm: float = 1.0          # gradient norm is clipped here
    grad_checkpoint: bool = True        # recompute the blocks in the backward pass, keep no activations
    compile: bool = False               # torch.compile each block (see that first_ratio_error stays 0)

    # run
    name: str = ""                      # the run's folder is runs/NAME (default: preset, algorithm, seed)
    seed: int = 0                       # fixes the whole run on one device
    device: str = ""                    # cuda, cpu ... (default: cuda where there is one)
    eval_every: int = 10                # epochs between evaluations
    eval_images: int = 128              # images of held-out prompts, the same prompts and noise every time
    eval_noise: float = 0.0             # noise of the evaluation's steps (0: none, an ODE; 1: as in training)
    eval_rewards: str = ""              # rewards, as for --reward, that only judge the held-out images
    eval_prompts: str = ""              # evaluate on all prompts of this .txt or .jsonl file instead
    resume: str = ""                    # continue the run in this folder, with its settings
    wandb: str = ""                     # also log to this Weights & Biases project


PRESETS = {
    "compressibility": dict(reward="compressibility", prompts="animals"),
    "aesthetic": dict(reward="aesthetic", prompts="animals"),
    "alignment": dict(reward="vlm", prompts="activities"),
    # The clip is for log-probabilities averaged over 2,048 latents here, and over 16,384 in the paper.
    "tiny": dict(model=str(HERE / "tiny-sd3"), reward=f"ocr@{HERE / 'tiny-sd3'}", prompts="signs", height=32,
                 width=64, max_sequence_length=1, images=192, group_size=8, stat_min=8, guidance=1.0,
                 random_steps=3, batch=96, decode_batch=96, clip=1e-3, lr=6e-4, epochs=60,
                 grad_checkpoint=False, eval_images=512, device="cpu"),
}


# ----------------------------------------------------------------------------------------------- LoRA by hand

class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank update: y = W x + (alpha / rank) B A x.

    (Hu et al. 2021, arXiv 2106.09685.) A is Gaussian and B zero, so the update starts as nothing. Both are
    stored in float32, and computed with in the precision of x.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A.to(x.dtype)), self.scale * self.B.to(x.dtype))


def add_lora(model, targets, rank=16, alpha=32):
    """Freeze `model` and put a LoRALinear in place of each linear layer whose name ends in a target.

    Returns {layer name: LoRALinear}. Raises ValueError if nothing matches.
    """
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(module, rank, alpha)
            setattr(model.get_submodule(parent), child, layers[name])
    if not layers:
        raise ValueError(f"no linear layer of {type(model).__name__} is named {' or '.join(targets)}")
    return layers


def save_lora(path, layers, prefix):
    """Write the update for diffusers' `load_lora_weights`, the scale alpha / rank folded into B.

    prefix: the network's name in its pipeline, "unet" or "transformer".
    """
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = layer.A.detach().cpu()
        tensors[f"{prefix}.{name}.lora_B.weight"] = layer.scale * layer.B.detach().cpu()
    write_aside(path, lambda aside: save_file(tensors, aside))


def load_lora(path, layers, prefix):
    """Read a file of `save_lora`. ValueError if its layers or shapes are others."""
    tensors = load_file(path)
    wanted = {f"{prefix}.{name}.lora_{part}.weight": getattr(layer, part).shape
              for name, layer in layers.items() for part in "AB"}
    if {key: tensor.shape for key, tensor in tensors.items()} != wanted:
        raise ValueError(f"{path} is no LoRA of these layers in these shapes: use the same model and --rank")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.A.copy_(tensors[f"{prefix}.{name}.lora_A.weight"])
            layer.B.copy_(tensors[f"{prefix}.{name}.lora_B.weight"] / layer.scale)


# ----------------------------------------------------------------------------- gradient checkpointing by hand

class Checkpoint(torch.autograd.Function):
    """Run a block and keep only its inputs; run it again when its gradient is asked for.

    (Chen et al. 2016, arXiv 1604.06174.) `tensors` are the block's `count` inputs followed by its trainable
    parameters, so that autograd sees both.
    """

    @staticmethod
    def forward(ctx, run, count, *tensors):
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        return run(*tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in saved[:ctx.count]]
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs, grads = zip(*[(y, g) for y, g in zip(outputs, grads) if y is not None and y.requires_grad])
        sources = [*inputs, *saved[ctx.count:]]
        wanted = [t for t in sources if t.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, None, *[next(found) if t.requires_grad else None for t in sources]


def checkpoint_blocks(blocks):
    """Checkpoint each of these modules wherever gradients are recorded, whatever its arguments are."""
    for block in blocks:
        def forward(*args, block=block, run=block.forward, **kwargs):
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            values = [*args, *kwargs.values()]
            slots = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
            tensors = [values[i] for i in slots]
            constants = [None if i in slots else value for i, value in enumerate(values)]

            def rerun(*tensors):
                filled = list(constants)
                for i, tensor in zip(slots, tensors):
                    filled[i] = tensor
                return run(*filled[:len(args)], **dict(zip(kwargs, filled[len(args):])))

            parameters = [p for p in block.parameters() if p.requires_grad]
            return Checkpoint.apply(rerun, len(slots), *tensors, *parameters)

        block.forward = forward


# ------------------------------------------------------------------------------------------------ mathematics

def gaussian_log_prob(x, mean, std):
    """log N(x; mean, std^2), averaged over all but the batch dimension: (B, C, H, W) -> (B,).

    The mean over D numbers, not their sum, as in the authors' code: the ratio of two policies becomes
    (p / p_old)^(1/D), of the same gradient at p = p_old but for the factor 1/D. The clip of 1e-4 is made for
    that, at D = 16,384.
    """
    log_prob = -(x - mean).square() / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    return log_prob.mean((1, 2, 3))


def ddim_step(output, x, t, t_prev, alphas_cumprod, eta=1.0, prev=None, prediction_type="epsilon",
              generator=None):
    """One step of DDIM from x_t to x_{t_prev}, and its log-probability: the policy of a UNet.

    (Song et al. 2021, arXiv 2010.02502, eq. 12; the variance is eta^2 times that of eq. 16.) At eta = 1 it is
    DDPM's ancestral step.

    output: the UNet's, "epsilon" or "v_prediction"; output, x, prev (B, C, H, W); t, t_prev (B,) long;
    alphas_cumprod (1000,). Before the first timestep (t_prev < 0) the image's alpha is alphas_cumprod[0].
    With prev the step taken is that one (training), else it is drawn with `generator` (sampling). Returns
    x_prev (B, C, H, W) and log_prob (B,), which is nan at eta = 0, where there is no density.
    """
    alpha = alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha_prev = alphas_cumprod[t_prev.clamp(min=0)].view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        noise = output
        x0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    elif prediction_type == "v_prediction":
        noise = alpha.sqrt() * output + (1 - alpha).sqrt() * x
        x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * output
    else:
        raise ValueError(f"prediction_type {prediction_type!r}: epsilon or v_prediction")
    std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
    mean = alpha_prev.sqrt() * x0 + (1 - alpha_prev - std**2).clamp(min=0).sqrt() * noise
    if prev is None:
        prev = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return prev, gaussian_log_prob(prev, mean, std)


def flow_sde_step(v, x, sigma, sigma_next, sigma_max, noise_level=0.7, prev=None, generator=None):
    """One step of a flow's SDE from sigma to sigma_next, and its log-probability: the policy of an SD 3.

    (Liu et al. 2025, Flow-GRPO, arXiv 2505.05470, eq. 9.) The SDE has the marginals of the flow's ODE:
    noise comes in, and the score, which the velocity knows, takes as much out. With dt = sigma_next - sigma,

        s = noise_level sqrt(sigma / (1 - sigma))
        mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt,        std = s sqrt(-dt)

    where at sigma = 1 the root has 1 - sigma_max below, sigma_max being the schedule's next sigma. At
    noise_level 0 it is Euler's step.

    v, x, prev (B, C, H, W); sigma, sigma_next () or (B,). Returns x_prev and log_prob (B,), nan at level 0.
    """
    sigma, sigma_next = sigma.view(-1, 1, 1, 1), sigma_next.view(-1, 1, 1, 1)
    dt = sigma_next - sigma
    s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()
    mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * (-dt).sqrt()
    if prev is None:
        prev = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return prev, gaussian_log_prob(prev, mean, std)


class PromptStatistics:
    """Advantages (R - mean) / std with each prompt's own running mean and standard deviation.

    (Black et al. 2023, sec. 5.) A prompt's last `buffer` rewards are remembered; while they are fewer than
    `minimum`, the batch's mean and deviation stand in. Prompts differ in how much reward they allow, and a
    policy should not be praised for an easy one.
    """

    def __init__(self, buffer=32, minimum=16):
        self.minimum = minimum
        self.rewards = defaultdict(lambda: deque(maxlen=buffer))

    def advantages(self, prompts, rewards, clip=5.0):
        """prompts: N str; rewards (N,), remembered from now on. Returns (N,), within plus and minus clip."""
        rewards = rewards.double()  # or the rounding of a mean, over a deviation of 0, would count
        for prompt, reward in zip(prompts, rewards.tolist()):
            self.rewards[prompt].append(reward)
        enough = lambda prompt: len(self.rewards[prompt]) >= self.minimum  # noqa: E731
        known = [rewards.new_tensor(self.rewards[prompt]) if enough(prompt) else rewards
                 for prompt in prompts]
        mean = torch.stack([values.mean() for values in known])
        std = torch.stack([values.std(correction=0) for values in known])
        return ((rewards - mean) / (std + 1e-6)).clamp(-clip, clip).float()


def score_function_loss(log_prob, advantages):
    """-mean A log p, whose gradient is REINFORCE's: right for the policy that drew the images. All (B,).

    (Black et al. 2023, sec. 4.3, DDPO_SF.)
    """
    return -(advantages * log_prob).mean()


def importance_sampling_loss(log_prob, old_log_prob, advantages, clip=1e-4):
    """mean max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)), ratio = p / p_old. All (B,).

    (Black et al. 2023, sec. 4.3, DDPO_IS, with PPO's clipping, arXiv 1707.06347, eq. 7.) Where the ratio has
    already gone the advantage's way by more than clip, there is no gradient left to go further.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


def rwr_weights(advantages, temperature=0.2):
    """Reward-weighted regression: softmax(A / temperature) over the N images, times N: 1 on average."""
    return torch.softmax(advantages / temperature, 0) * len(advantages)


def best_images(advantages, keep=0.1):
    """Indices of the best `keep` of N images, repeated to N: rwr-sparse trains on these alone."""
    count = max(round(keep * len(advantages)), 1)
    best = advantages.topk(count).indices
    return best.repeat(-(-len(advantages) // count))[:len(advantages)]


# -------------------------------------------------------------------------------------------- model families

class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet that predicts the noise, or v, and the step of DDIM.

    A family says how prompts are encoded, what the network predicts, how a step is taken and how latents
    become images; and, for the two baselines, how an image is noised. `i` counts the sampler's steps from 0,
    an int or (B,). Conditions are tuples of tensors, a row a prompt.
    """

    prefix, targets = "unet", ("to_q", "to_k", "to_v", "to_out.0")
    steps, guidance, ode_steps = 50, 5.0, 0  # unless the settings say otherwise

    def __init__(self, pipe, s, device):
        from diffusers import DDIMScheduler
        self.pipe, self.network, self.s, self.device = pipe, pipe.unet, s, device
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(s.steps)
        self.t = scheduler.timesteps.to(device)
        if self.t[-1] == 0:
            raise ValueError("its scheduler has steps_offset 0: the step to the image would have no "
                             "noise, and no log-probability. Set it to 1")
        self.t_prev = self.t - scheduler.config.num_train_timesteps // s.steps
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        self.prediction_type = scheduler.config.prediction_type

    def encode(self, prompts):
        """Embeddings (N, L, D)."""
        return (self.pipe.encode_prompt(prompts, self.device, 1, False)[0],)

    def predict(self, x, i, cond):
        """The UNet's output for x_t (B, C, h, w), float32."""
        t = self.t[i].expand(len(x))
        return self.network(x.to(self.network.dtype), t, *cond, return_dict=False)[0].float()

    def step(self, output, x, i, prev=None, noise=1.0, generator=None):
        """x_{t-1} and its log-probability (B,); noise scales eta."""
        t, t_prev = self.t[i].expand(len(x)), self.t_prev[i].expand(len(x))
        return ddim_step(output, x, t, t_prev, self.alphas_cumprod, noise * self.s.eta, prev,
                         self.prediction_type, generator)

    def add_noise(self, x0, noise, i):
        """x_t and what the UNet should predict there."""
        alpha = self.alphas_cumprod[self.t[i]].view(-1, 1, 1, 1)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        return x, noise if self.prediction_type == "epsilon" else v

    def decode(self, latents):
        """Latents (B, C, h, w) to pixels in -1..1."""
        return self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample


class StableDiffusion3:
    """Stable Diffusion 3.x: a transformer that predicts the flow's velocity, and the step of its SDE."""

    prefix = "transformer"
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
               "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
    steps, guidance, ode_steps = 10, 4.5, 1  # no noise in the last: Flow-GRPO does not train on it

    def __init__(self, pipe, s, device):
        self.pipe, self.network, self.s, self.device = pipe, pipe.transformer, s, device
        pipe.scheduler.set_timesteps(s.steps)
        self.sigmas = pipe.scheduler.sigmas.to(device, torch.float32)

    def encode(self, prompts):
        """Embeddings (N, L, D) and pooled embeddings (N, P)."""
        parts = self.pipe.encode_prompt(prompts, None, None, device=self.device,
                                        do_classifier_free_guidance=False,
                                        max_sequence_length=self.s.max_sequence_length)
        return parts[0], parts[2]

    def predict(self, x, i, cond):
        """The velocity at x_sigma (B, C, h, w), float32."""
        timestep = 1000 * self.sigmas[i].expand(len(x))
        return self.network(x.to(self.network.dtype), *cond, timestep, return_dict=False)[0].float()

    def step(self, output, x, i, prev=None, noise=1.0, generator=None):
        """The next x and its log-probability (B,); noise scales noise_level."""
        return flow_sde_step(output, x, self.sigmas[i], self.sigmas[i + 1], self.sigmas[1],
                             noise * self.s.noise_level, prev, generator)

    def add_noise(self, x0, noise, i):
        """x_sigma and the velocity there."""
        sigma = self.sigmas[i].view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise, noise - x0

    def decode(self, latents):
        """Latents (B, C, h, w) to pixels in -1..1."""
        config = self.pipe.vae.config
        return self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample


FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3}


def guided(family, x, i, cond, empty, guidance):
    """The family's prediction, or with guidance out(empty) + guidance (out(c) - out(empty)).

    (Ho and Salimans 2022.) Sampling and training both come through here, with the same rows in a batch and
    the same kernels: only so is the ratio of the first update exactly 1.
    """
    # On a CPU, fused attention is three times as slow in backward; and it must not differ from sampling.
    plain = sdpa_kernel(SDPBackend.MATH) if x.device.type == "cpu" else contextlib.nullcontext()
    with plain:
        if guidance == 1.0:
            return family.predict(x, i, cond)
        both = [torch.cat([e.expand_as(c), c]) for e, c in zip(empty, cond)]
        i = torch.cat([i, i]) if isinstance(i, torch.Tensor) else i
        without, with_prompt = family.predict(torch.cat([x, x]), i, both).chunk(2)
        return without + guidance * (with_prompt - without)


# --------------------------------------------------------------------------------- rollout and training steps

def denoise(family, x, cond, empty, s, noise=1.0, generator=None):
    """Walk from x_T to the image: yields every next x and the log-probability (B,) of the step to it.

    Steps after the first s.random_steps have no noise, hence no log-probability: they count as environment,
    though the policy takes them too. What a change of it would do there is left out of the gradient.
    """
    for i in range(s.steps):
        output = guided(family, x, i, cond, empty, s.guidance)
        level = noise if i < s.random_steps else 0.0
        x, log_prob = family.step(output, x, i, noise=level, generator=generator)
        yield x, log_prob


@torch.no_grad()
def rollout(family, noise, cond, empty, chunks, s, store, generator):
    """Draw images and keep the whole way to them. noise x_T (N, C, h, w); cond has N rows; chunks of rows are
    the batches.

    Returns the trajectory (N, T + 1, C, h, w), x_T first, on the device `store`, and log p (N, R) of its R
    random steps.
    """
    trajectory = torch.empty(len(noise), s.steps + 1, *noise.shape[1:], device=store)
    log_probs = torch.empty(len(noise), s.random_steps, device=noise.device)
    for rows in tqdm(chunks, desc="sample", leave=False):
        trajectory[rows, 0] = noise[rows].to(store)
        walk = denoise(family, noise[rows], [t[rows] for t in cond], empty, s, generator=generator)
        for i, (x, log_prob) in enumerate(walk):
            trajectory[rows, i + 1] = x.to(store)
            if i < s.random_steps:
                log_probs[rows, i] = log_prob
    return trajectory, log_probs


def policy_gradients(family, trajectory, log_probs, advantages, cond, empty, chunks, steps, s):
    """Add the gradients of one update: on its chunks of images, one denoising step of `steps` at a time.

    Returns what to log, means over images and steps: the loss, the ratio's excess over 1 and its square, the
    least and greatest ratio, the share beyond the clip, and PPO's approx_kl, (log ratio)^2 / 2. The ratio is
    the one that the loss sees, of log-probabilities averaged over the latents.
    """
    logs = defaultdict(float, ratio_min=math.inf, ratio_max=-math.inf)
    count = sum(map(len, chunks))
    for rows in chunks:
        here, A = [t[rows] for t in cond], advantages[rows]
        for i in steps:
            x, prev = trajectory[rows, i].to(A.device), trajectory[rows, i + 1].to(A.device)
            log_prob = family.step(guided(family, x, i, here, empty, s.guidance), x, i, prev)[1]
            old = log_probs[rows, i]
            loss = (score_function_loss(log_prob, A) if s.algorithm == "sf" else
                    importance_sampling_loss(log_prob, old, A, s.clip))
            share = len(rows) / count / len(steps)
            backward(loss, share, f"denoising step {i}")
            change = log_prob.detach() - old
            ratio, excess = change.exp(), change.expm1()  # a float32 near 1 has few digits for its deviation
            means = {"loss": loss, "ratio_excess": excess.mean(), "excess_squared": excess.square().mean(),
                     "clip_fraction": (excess.abs() > s.clip).float().mean(),
                     "approx_kl": change.square().mean() / 2}
            for key, value in zip(means, torch.stack([*means.values()]).tolist()):  # one wait for the GPU
                logs[key] += share * value
            logs["ratio_min"] = min(logs["ratio_min"], ratio.min().item())
            logs["ratio_max"] = max(logs["ratio_max"], ratio.max().item())
    return logs


def regression_gradients(family, x0, weights, cond, empty, chunks, s, generator):
    """The baselines' update: the denoising loss mean w |output - target|^2 on the model's own images x0.

    Each image is noised s.train_timesteps times, to one of the sampler's own levels. The output is guided if
    sampling is, as in the authors' code. Returns what to log.
    """
    logs, count = defaultdict(float), sum(map(len, chunks))
    for rows in chunks:
        here = [t[rows] for t in cond]
        for _ in range(s.train_timesteps):
            i = torch.randint(s.steps, (len(rows),), generator=generator, device=x0.device)
            noise = torch.randn(x0[rows].shape, generator=generator, device=x0.device)
            x, target = family.add_noise(x0[rows], noise, i)
            error = (guided(family, x, i, here, empty, s.guidance) - target).square().mean((1, 2, 3))
            loss, share = (weights[rows] * error).mean(), len(rows) / count / s.train_timesteps
            backward(loss, share, "a denoising step")
            logs["loss"] += share * loss.item()
    return logs


def backward(loss, weight, where):
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()} at {where}")
    (weight * loss).backward()


# -------------------------------------------------------------------------------------------- data in and out

def load_family(s, device):
    """The pretrained pipeline, frozen, as its model family: network and VAE on the device, text encoders on
    the CPU. Settings that the family decides are filled in. ValueError for a pipeline of another kind.
    """
    import diffusers
    config = diffusers.DiffusionPipeline.load_config(s.model)
    kind = config.get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"it is a {kind}, none of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    s.steps, s.guidance = s.steps or family.steps, s.guidance or family.guidance
    s.random_steps = s.random_steps or max(s.steps - family.ode_steps, 1)
    # What model_index.json holds as null must be passed as None, or from_pretrained looks for it.
    absent = {name: None for name, part in config.items()
              if isinstance(part, (list, tuple)) and part[0] is None}
    if family is StableDiffusion:
        absent |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    dtype = {"default": {"bf16": torch.bfloat16, "fp32": torch.float32}[s.dtype], "vae": torch.float32}
    pipe = getattr(diffusers, kind).from_pretrained(s.model, dtype=dtype, low_cpu_mem_usage=False, **absent)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    family = family(pipe, s, device)
    family.network.to(device)
    pipe.vae.to(device)
    return family


def text_encoders(pipe):
    return [m for name, m in pipe.components.items() if name.startswith("text_encoder") and m is not None]


@torch.no_grad()
def encode(family, prompts):
    """N prompts to the family's conditions, N rows each. The text encoders visit the device for it."""
    for module in text_encoders(family.pipe):
        module.to(family.device)
    distinct = list(dict.fromkeys(prompts))
    parts = [family.encode(distinct[i:i + 16]) for i in range(0, len(distinct), 16)]
    for module in text_encoders(family.pipe):
        module.to("cpu")
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=family.device)
    return [torch.cat(part)[rows] for part in zip(*parts)]


@torch.no_grad()
def decode(family, latents, batch):
    """Latents (N, C, h, w) to a list of N PIL images."""
    images = []
    for z in latents.split(batch):
        x = (family.decode(z) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        images += [Image.fromarray(pixels) for pixels in x.permute(0, 2, 3, 1).cpu().numpy()]
    return images


def latent_shape(family, s):
    """(C, h, w) of one image's latents."""
    scale = family.pipe.vae_scale_factor
    return family.network.config.in_channels, s.height // scale, s.width // scale


def blocks_of(network):
    """What is checkpointed and compiled one by one: a transformer's blocks, a UNet's and its resnets."""
    kinds = ("JointTransformerBlock", "BasicTransformerBlock", "ResnetBlock2D")
    return [module for module in network.modules() if type(module).__name__ in kinds]


def trajectory_device(count, device):
    """Where to keep `count` float32 numbers: on the GPU, if they take at most a quarter of what is free."""
    if device.type == "cuda" and 4 * count > torch.cuda.mem_get_info(device)[0] / 4:
        return torch.device("cpu")
    return device


def write_aside(path, write):
    """Call write(aside) on a path beside `path`, then rename: a killed save leaves the previous file."""
    aside = f"{path}.aside"
    write(aside)
    os.replace(aside, path)


def save(run, name):
    """Write a checkpoint, runs/NAME/last or best: the LoRA for diffusers, and all that --resume needs."""
    folder = run.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    lora = {name: {"A": layer.A.detach(), "B": layer.B.detach()} for name, layer in run.layers.items()}
    state = dict(lora=lora, optimizer=run.optimizer.state_dict(), progress=run.progress,
                 rng=run.generator.get_state(),
                 statistics={prompt: list(own) for prompt, own in run.statistics.rewards.items()})
    write_aside(folder / "state.pt", lambda aside: torch.save(state, aside))
    save_lora(folder / "pytorch_lora_weights.safetensors", run.layers, run.family.prefix)


def restore(run, name):
    """The reverse of `save`. Lines of metrics.jsonl that training will write again go."""
    state = torch.load(run.folder / name / "state.pt", map_location="cpu", weights_only=True)
    for layer_name, layer in run.layers.items():
        layer.load_state_dict(state["lora"][layer_name], strict=False)  # the frozen base is not in it
    run.optimizer.load_state_dict(state["optimizer"])
    run.optimizer.param_groups[0].update(lr=run.s.lr, weight_decay=run.s.weight_decay)  # flags may differ
    run.generator.set_state(state["rng"])
    run.progress.update(state["progress"])
    for prompt, own in state["statistics"].items():
        run.statistics.rewards[prompt].extend(own)
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


def count_flops(family, shape, cond):
    """Floating-point operations of one forward pass for one image, counted, not estimated."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.predict(torch.zeros(1, *shape, device=family.device), 0, [t[:1] for t in cond])
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
    judge: Any                      # the rewards of --eval-rewards, or None
    stream: Iterator                # endless (prompt, metadata) to train on
    held_out: tuple                 # prompts, metadata, conditions to evaluate on
    empty: list                     # the empty prompt's conditions, for guidance
    family: Any                     # the pretrained model, with LoRA layers in its network
    layers: dict                    # those LoRALinear, by name
    optimizer: torch.optim.Optimizer
    statistics: PromptStatistics    # the rewards that each prompt had lately
    generator: torch.Generator      # draws everything that is random after the prompts
    flops: int                      # floating-point operations of one image's forward pass
    progress: dict                  # epoch, step, prompts, images, seconds and best reward so far


def validate(s):
    """Fill in what the algorithm decides. Refuse settings that contradict each other, in one line."""
    for name, choices in (("dtype", ("bf16", "fp32")), ("algorithm", ("is", "sf", "rwr", "rwr-sparse"))):
        if getattr(s, name) not in choices:
            raise SystemExit(f"--{name} {getattr(s, name)}: choose from {', '.join(choices)}")
    s.updates = s.updates or (1 if s.algorithm == "sf" else 4)
    for name in ("images", "group_size", "updates", "batch", "decode_batch", "reward_batch", "stat_buffer",
                 "eval_every", "eval_images", "rank"):
        if getattr(s, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    for name in ("updates", "group_size"):
        if s.images % getattr(s, name):
            raise SystemExit(f"--images {s.images} is no multiple of --{name.replace('_', '-')} "
                             f"{getattr(s, name)}")
    if s.algorithm == "sf" and s.updates > 1:
        raise SystemExit(f"--algorithm sf --updates {s.updates}: the score function holds for the policy "
                         "that drew the images, so for one update; --algorithm is takes several")
    if s.keep > 1:
        raise SystemExit(f"--keep {s.keep}: a share of the images, at most 1")
    if s.stat_min > s.stat_buffer:
        raise SystemExit(f"--stat-min {s.stat_min}: no prompt would ever have so many, --stat-buffer is "
                         f"{s.stat_buffer}")
    for name in ("clip", "advantage_clip", "temperature", "keep", "noise_level", "eta"):
        if not getattr(s, name) > 0:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(s, name)}: must be positive")


def prepare(s):
    """Load and check all that a run needs. A user's mistake is a SystemExit of one line."""
    given = asdict(s)  # what is 0 is filled in below, and anew where a resumed run has other flags
    validate(s)
    device = torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(s.resume or Path("runs", s.name))
    if (folder / "metrics.jsonl").exists() and not s.resume:
        raise SystemExit(f"{folder} holds a run: choose another --name, or go on with --resume {folder}")
    if device.type == "cpu" and not s.device and not Path(s.model).exists():
        raise SystemExit(f"{s.model} needs a CUDA device, and there is none here. Try `python ddpo.py "
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
        family = load_family(s, device)
    except ValueError as error:
        raise SystemExit(f"error: cannot take {s.model}: {error}") from error
    except OSError as error:
        cause = str(error).strip().splitlines()[0]
        raise SystemExit(f"error: cannot load {s.model} ({cause}). If its weights are gated, accept the "
                         f"licence on https://huggingface.co/{s.model} and run `hf auth login`; or try "
                         "`python ddpo.py --preset tiny`, the bundled model") from None
    if not 1 <= s.random_steps <= s.steps:
        raise SystemExit(f"--random-steps {s.random_steps}: they are the first of the {s.steps} of --steps")
    regression = s.algorithm.startswith("rwr")
    if s.train_timesteps > s.random_steps and not regression or s.train_timesteps < 0:
        raise SystemExit(f"--train-timesteps {s.train_timesteps}: there are {s.random_steps} random steps to "
                         "draw them from (0: all)")
    s.train_timesteps = s.train_timesteps or (s.steps if regression else s.random_steps)

    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")
    held_out, empty = encode(family, prompts), encode(family, [""])
    flops = count_flops(family, latent_shape(family, s), empty)
    layers = add_lora(family.network, family.targets, s.rank, s.alpha)
    if s.lora and not s.resume:
        try:
            load_lora(Path(s.lora, "pytorch_lora_weights.safetensors"), layers, family.prefix)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--lora {s.lora}: {error}") from None
    blocks = blocks_of(family.network)
    if s.compile:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if s.grad_checkpoint:
        checkpoint_blocks(blocks)
    optimizer = torch.optim.AdamW([p for p in family.network.parameters() if p.requires_grad], lr=s.lr,
                                  betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay)
    run = Run(s, folder, reward, judge, stream, (prompts, metadata, held_out), empty, family, layers,
              optimizer, PromptStatistics(s.stat_buffer, s.stat_min),
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
        text = json.dumps(given, indent=2)
        write_aside(folder / "args.json", lambda aside: Path(aside).write_text(text))
    if s.wandb:
        import wandb
        wandb.init(project=s.wandb, name=folder.name, config=asdict(s))
    return run


def train(s):
    """Sample, score, improve (Black et al. 2023, sec. 4). Returns the run's folder."""
    run = prepare(s)
    family, device, progress = run.family, run.family.device, run.progress
    shape, N = latent_shape(family, s), s.images
    batches = lambda order: [share.split(s.batch) for share in order.split(N // s.updates)]  # noqa: E731
    in_order = batches(torch.arange(N))  # for each update, its images in batches
    store = trajectory_device(N * (s.steps + 1) * math.prod(shape), device)
    parameters = run.optimizer.param_groups[0]["params"]
    regression = s.algorithm.startswith("rwr")

    for epoch in range(progress["epoch"], s.epochs):
        if epoch % s.eval_every == 0:
            evaluate(run, epoch)
        clock = Clock(device)

        with clock("sample"):  # 1. act: every image is a trajectory of decisions
            drawn = list(itertools.islice(run.stream, N // s.group_size))
            prompts, metadata = zip(*[pair for pair in drawn for _ in range(s.group_size)])
            cond = encode(family, prompts)
            noise = torch.randn(N, *shape, generator=run.generator, device=device)
            trajectory, log_probs = rollout(family, noise, cond, run.empty, sum(in_order, ()), s, store,
                                            run.generator)
            x0 = trajectory[:, -1].to(device, copy=True)  # a view would keep all of the trajectory
            images = decode(family, x0, s.decode_batch)

        with clock("reward"):  # 2. score
            R, parts = run.reward.score(images, prompts, metadata)
            A = run.statistics.advantages(prompts, R, s.advantage_clip).to(device)

        with clock("train"):  # 3. improve
            updates = in_order
            if regression:
                sparse = s.algorithm == "rwr-sparse"
                weights = torch.ones_like(A) if sparse else rwr_weights(A, s.temperature)
                order = torch.randperm(N, generator=run.generator, device=device)
                updates = batches(best_images(A, s.keep)[order] if sparse else order)
            logs = []
            for chunks in tqdm(updates, desc="train", leave=False):
                if regression:
                    entry = regression_gradients(family, x0, weights, cond, run.empty, chunks, s,
                                                 run.generator)
                else:
                    steps = torch.randperm(s.random_steps, generator=run.generator, device=device)
                    entry = policy_gradients(family, trajectory, log_probs, A, cond, run.empty, chunks,
                                             steps[:s.train_timesteps].tolist(), s)
                grad_norm = nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
                if not grad_norm.isfinite():
                    raise FloatingPointError(f"the gradient norm is {grad_norm.item()}")
                run.optimizer.step()  # 4. step
                run.optimizer.zero_grad()
                progress["step"] += 1
                logs.append({**entry, "grad_norm": grad_norm.item()})
            del trajectory  # before the next one is drawn

        seconds = sum(clock.seconds.values())
        for key, more in {"epoch": 1, "prompts": len(drawn), "images": N, "seconds": seconds}.items():
            progress[key] += more
        report(run, clock.seconds, R, parts, logs)
        save(run, "last")
    evaluate(run, progress["epoch"])
    return run.folder


def evaluate(run, epoch):
    """Draw the held-out prompts with the policy, always from the same noise; score, log and show them."""
    s, family, (prompts, metadata, cond) = run.s, run.family, run.held_out
    generator = torch.Generator().manual_seed(1234)
    noise = torch.randn(len(prompts), *latent_shape(family, s), generator=generator).to(family.device)
    generator = torch.Generator(family.device).manual_seed(4321)  # not x_T's numbers once more
    latents = []
    with torch.no_grad():
        for rows in tqdm(torch.arange(len(prompts)).split(s.batch), desc="evaluate", leave=False):
            for x, _ in denoise(family, noise[rows], [t[rows] for t in cond], run.empty, s, s.eval_noise,
                                generator):
                pass
            latents.append(x)
    images = decode(family, torch.cat(latents), s.decode_batch)
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


def report(run, seconds, R, parts, logs):
    """Log a training epoch and print its line. Every run is its own benchmark.

    Model FLOPs: a forward pass an image and step in sampling; in training a forward and a backward (which
    costs one more: frozen weights need no gradient); all twice with guidance. Recomputation does not count.
    """
    s = run.s
    passes = (s.steps + 2 * s.train_timesteps) * (1 + (s.guidance != 1))
    tflops = len(R) * passes * run.flops / (seconds["sample"] + seconds["train"]) / 1e12
    rate, device, epoch = len(R) / sum(seconds.values()), run.family.device, run.progress["epoch"] - 1
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu and s.dtype == "bf16"), None)
    mfu = tflops / peak if peak else None
    merged = {key: sum(line[key] for line in logs) / len(logs) for key in logs[0]}
    if "ratio_excess" in merged:
        excess = merged.pop("ratio_excess")
        merged["ratio"] = 1 + excess
        merged["ratio_min"] = min(line["ratio_min"] for line in logs)
        merged["ratio_max"] = max(line["ratio_max"] for line in logs)
        merged["ratio_std"] = max(merged.pop("excess_squared") - excess ** 2, 0) ** 0.5
        # The first update is of the policy that drew the images: anything but 0 is a bug, or another kernel.
        merged["first_ratio_error"] = max(1 - logs[0]["ratio_min"], logs[0]["ratio_max"] - 1)
    log(run, split="train", epoch=epoch, **rewards_of(run, R, parts), **merged,
        **{f"{phase}_seconds": t for phase, t in seconds.items()}, images_per_second=rate, tflops=tflops,
        mfu=mfu, peak_gb=peak_memory(device))
    phases = " ".join(f"{phase} {t:.1f}s" for phase, t in seconds.items())
    ratio = ""
    if "ratio" in merged:
        ratio = f"  KL {merged['approx_kl']:.1e}  clipped {merged['clip_fraction']:.0%}"
    tqdm.write(f"epoch {epoch:4d}  reward {R.mean():.4f}  loss {merged['loss']:.4f}{ratio}  grad "
               f"{merged['grad_norm']:.3f}  |  {phases}  {rate:.1f} img/s  {tflops:.2f} TFLOP/s"
               + (f" ({mfu:.0%} MFU)" if mfu else "") + f"  {peak_memory(device):.1f} GB")


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
        else:
            parser.add_argument(flag, type=field.type, metavar=field.name.split("_")[-1].upper(), help=text)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        path = Path(given["resume"], "args.json")
        if not path.exists():
            raise SystemExit(f"--resume {path.parent}: no {path}; give a run's folder, such as runs/NAME")
        defaults = json.loads(path.read_text())
        if defaults.keys() - help_text.keys():
            raise SystemExit(f"--resume {path.parent}: it is no run of ddpo.py")
        if "lora" in given:
            raise SystemExit(f"--resume {path.parent} has a LoRA of its own; --lora starts a new run")
    else:
        by_reward = {preset["reward"]: name for name, preset in PRESETS.items()}
        preset = given.setdefault("preset", by_reward.get(given.get("reward", Settings.reward), ""))
        if preset and preset not in PRESETS:
            raise SystemExit(f"--preset {preset}: no such preset; choose from {', '.join(PRESETS)}")
        defaults = PRESETS.get(preset, {})
    s = Settings(**{**defaults, **given})
    task = s.preset or re.sub(r"\W+", "-", s.reward)
    s.name = s.name or f"ddpo-{task}-{s.algorithm}-seed{s.seed}"
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
