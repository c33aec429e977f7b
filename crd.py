"""CRD, Centered Reward Distillation (Zhu et al. 2026, arXiv 2603.14128), in one file.

Fine-tune a flow-matching text-to-image model so that its images score higher under any reward.
What a reader who knows PPO would not expect:

1. No policy gradient: a regression of the policy's log-ratio to a reference on the reward, both
   centered per prompt.
2. No trajectories: a finished image is noised and denoised once, so any ODE sampler will do.
3. No classifier-free guidance in sampling: a penalty, the anchor, teaches it to the policy.

Why it works: max_p E_p[r] - beta KL(p || p_old) has the optimum p* = p_old exp(r / beta) / Z, so
r = beta log(p* / p_old) + beta log Z, for any image, whoever drew it. Z is intractable but depends
on the prompt alone: subtract, on both sides, the mean over K images of one prompt, and it is gone.

    x0, noise, sigma   an image's latents, Gaussian noise, noise level in [0, 1]
    x, u               the noised image (1 - sigma) x0 + sigma noise; its velocity, noise - x0
    v, v_old, v_ref    u as predicted by the policy, by the reference `old`, and by the
                       pretrained model with guidance
    rho                how much better than `old` the policy denoises: a proxy of log p / p_old
    R, s               reward; its advantage, clipped to +-A_max and scaled to [0, 1]
    n, kappa           reward scaled to [0, 1] by its own range; weight of the anchor, grows with n

    rho = mean (v_old - u)^2 / m_old - mean (v - u)^2 / m,  m = mean |v - u|    implicit_reward
    L   = A_max / beta mean_i [beta (rho_i - mean rho) - (s_i - mean s)]^2             crd_loss
          + mean_i kappa_i mean (v - v_ref)^2                                       anchor_loss

One frozen model carries four LoRA adapters. `policy` is trained. `sampler` draws the images and
`old` is the reference, EMAs of the policy at paces of their own: images should be recent, while
rho measures, and L limits, how far the policy is from `old`. `ema`, a third, is evaluated and
saved. Every epoch, `train` draws K images of each prompt (generate), scores them
(reward_targets), takes optimizer steps on L (objective) and lets `old` and `sampler` follow.

    python crd.py --preset tiny    # the bundled toy model, in minutes on any CPU
    python crd.py --reward ocr     # Stable Diffusion 3.5 Medium learns to spell, on one GPU
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import diffusers
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm
from transformers import HfArgumentParser

import rewards

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
TINY = str(Path(__file__).resolve().parent / "tiny-sd3")
DECAY = "of an EMA updated once per epoch; ramps with optimizer steps: start, value, slope, end"


def arg(default, help):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Everything a run depends on. A preset is a set of other defaults; flags override it."""

    # model
    preset: Literal["ocr", "geneval", "tiny"] | None = arg(None, "default: reward's")
    model: str = arg("stabilityai/stable-diffusion-3.5-medium", "folder or repo")
    dtype: Literal["bf16", "fp32"] | None = arg(None, "default: bf16 on CUDA only")
    height: int = arg(512, "in pixels")
    width: int = arg(512, "in pixels")
    max_sequence_length: int = arg(128, "T5 tokens per prompt")
    rank: int = arg(32, "LoRA rank")
    alpha: float = arg(64, "the LoRA scale is alpha / rank")
    lora: str | None = arg(None, "folder of a LoRA to start from")
    # rollout
    reward: str = arg("ocr", "name[@path-or-repo][:weight], joined by commas")
    prompts: str | None = arg(None, "set or file; default: the reward's own")
    groups: int = arg(48, "prompts per epoch")
    group_size: int = arg(24, "images per prompt, K")
    rollout_steps: int = arg(10, "sampler steps of a rollout")
    # loss
    beta: float = arg(1.0, "scale of rho: the larger, the closer to `old`")
    tau: float = arg(math.inf, "softmax temperature of the group mean; inf: plain")
    reward_weight: float = arg(1.0, "weight of the CRD loss; 0: the anchor alone")
    anchor: float = arg(0.1, "kappa, the anchor's largest weight; 0: no anchor")
    anchor_guidance: float = arg(4.5, "guidance of the anchor; 1: unguided")
    anchor_adaptive: bool = arg(True, "kappa_i grows with the image's reward")
    train_timesteps: int = arg(9, "noise levels per step, drawn from the rollout's")
    # optimization
    epochs: int = arg(300, "in all; 0: only evaluate")
    steps_per_epoch: int = arg(1, "optimizer steps, each on a share of the groups")
    micro_batch: int = arg(24, "images at once, in sampling as in training")
    lr: float = arg(3e-4, "AdamW learning rate")
    old_decay: list[float] = arg([0, 0.25, 0.001, 0.5], DECAY)
    sampler_decay: list[float] = arg([0, 0, 0.001, 0.5], DECAY)
    ema: float = arg(0.9, "decay of the EMA that is evaluated, after a warm-up")
    grad_checkpoint: bool = arg(True, "recompute blocks in the backward pass")
    compile: bool = arg(False, "torch.compile each transformer block")
    # run
    name: str | None = arg(None, "the run's folder is runs/NAME")
    seed: int = arg(0, "same seed, same run, as far as the device's kernels are deterministic")
    device: str | None = arg(None, "default: cuda if there is one")
    eval_every: int = arg(10, "epochs between evaluations")
    eval_images: int = arg(128, "held-out prompts, always with the same noise")
    eval_steps: int = arg(40, "sampler steps of an evaluation")
    eval_guidance: float = arg(1.0, "guidance of evaluations; rollouts have none")
    eval_rewards: str | None = arg(None, "held-out rewards, like --reward")
    eval_prompts: str | None = arg(None, "evaluate on all prompts of this file")
    resume: str | None = arg(None, "continue the run in this folder")
    wandb: str | None = arg(None, "also log to this Weights & Biases project[/run]")


PRESETS = {
    "ocr": dict(
        reward="ocr", steps_per_epoch=2,
        old_decay=[0, 0.25, 0.005, 0.999], sampler_decay=[75, 0.0, 0.0075, 0.999],
    ),
    "geneval": dict(reward="geneval"),
    "tiny": dict(
        model=TINY, device="cpu", height=32, width=64, max_sequence_length=1, rank=16, alpha=32,
        reward=f"ocr@{TINY}", prompts="signs", group_size=8, rollout_steps=6,
        anchor_guidance=4.0, train_timesteps=6, epochs=24, steps_per_epoch=12, micro_batch=64,
        lr=3e-3, ema=0.97, old_decay=[0, 0.25, 0.01, 0.9], grad_checkpoint=False,
        eval_every=8, eval_images=512, eval_steps=10,
        eval_rewards=f"ocr@{TINY}/judge,clipscore@{TINY}/clip,color",
    ),
}  # fmt: skip


# The mathematics, in the order in which the loop calls it. Latents are (B, ...).


def sample_ode(velocity, noise, sigmas):
    """Integrate dx / dsigma = v from noise to an image, by DPM-Solver++(2M) (arXiv 2211.01095).

    A step from s to t is x_t = D + t / s (x_s - D). In Euler's method D is the predicted image x0.
    Here it is extrapolated in log-SNR from the last two, except in the first and last step and in
    any that is more than twice as long in log-SNR as the one before, where that overshoots.
    velocity(x, sigma ()) -> (B, ...); noise (B, ...); sigmas (S + 1,), descending to 0.
    """
    if sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must descend to 0, not {sigmas.tolist()}")
    gaps = torch.log((1 - sigmas) / sigmas).diff()
    # Log-SNR is infinite at sigma 1 and 0: step 2 extrapolates by 0, the last step is Euler's.
    ratios = [math.inf, *(gaps[1:] / gaps[:-1]).tolist()]
    x = noise
    last_x0 = None
    for s, t, ratio in zip(sigmas[:-1], sigmas[1:], ratios):
        x0 = x - s * velocity(x, s)
        D = x0
        if ratio <= 2:
            D = x0 + ratio / 2 * (x0 - last_x0)
        x = D + t / s * (x - D)
        last_x0 = x0
    return x


def reward_targets(R, group_size, clip=5.0):
    """s = A / (2 clip) + 1/2, with A = (R - mean_group R) / (std_all R + 1e-4) clipped to +-clip.

    R (N,), whole groups side by side -> s (N,) in [0, 1].
    """
    groups = R.view(-1, group_size)
    centered = groups - groups.mean(1, keepdim=True)
    A = centered.flatten() / (R.std(correction=0) + 1e-4)
    return A.clamp(-clip, clip) / (2 * clip) + 0.5


def add_noise(x0, noise, sigma):
    """(1 - sigma) x0 + sigma noise, on flow matching's straight path. sigma () or (B,)."""
    sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise


def implicit_reward(v, v_old, u):
    """rho = mean (v_old - u)^2 / m_old - mean (v - u)^2 / m; v, v_old, u (B, ...) -> (B,) float32.

    By the ELBO, minus a denoising error stands for a log-likelihood (paper, sec. 3). The weights
    m = mean |v - u| even out the sigmas (DiffusionNFT, arXiv 2509.16117), so rho is a proxy.
    """

    def weighted_error(prediction):
        error = (prediction.float() - u.float()).flatten(1)  # bf16 would round rho away
        m = error.abs().mean(1).detach().clamp(min=1e-5)
        return error.square().mean(1) / m

    return weighted_error(v_old) - weighted_error(v)


def crd_loss(rho, targets, group_size, beta=1.0, clip=5.0, tau=math.inf):
    """A_max / beta mean_i [beta (rho_i - mean_K rho) - (s_i - mean_K s)]^2, with A_max = clip.

    rho, targets s (B,), whole groups side by side. At rho = 0 its gradient is that of -mean_i A_i
    rho_i. If tau is finite, the loss is the mean of two: one centers by group means with weights
    softmax(s / tau), one with softmax(-s / tau).
    """
    rho = rho.view(-1, group_size)
    s = targets.view(-1, group_size)
    weights = torch.softmax(torch.stack([s, -s]) / tau, -1)  # 1 / K at tau = inf
    mean_rho = (weights * rho.detach()).sum(-1, keepdim=True)  # a constant
    mean_s = (weights * s).sum(-1, keepdim=True)
    residual = beta * (rho - mean_rho) - (s - mean_s)
    return clip / beta * residual.square().mean()


def anchor_loss(v, v_ref, normalized_reward, kappa, kappa_min=1e-4):
    """mean_i kappa_i mean (v - v_ref)^2, with kappa_i = kappa_min + n_i (kappa - kappa_min).

    The KL to the model of v_ref, up to a weight per sigma: weak for images of low reward n (B,) in
    [0, 1], which have much to learn, strong where the reward might be exploited.
    """
    kappa = kappa_min + normalized_reward * (kappa - kappa_min)
    return (kappa * (v - v_ref).square().flatten(1).mean(1)).mean()


def ema_decay(step, start_step, start_value, slope, end_value):
    """What an EMA adapter keeps of itself at optimizer step `step`: flat, a ramp, flat again."""
    if step < start_step:
        return start_value
    return min(start_value + slope * (step - start_step), end_value)


def objective(predict, x0, noise, sigma, targets, normalized_reward, args):
    """L and its terms at one sigma, for whole groups. predict(x, sigma, adapter, guidance) -> v."""
    x = add_noise(x0, noise, sigma)
    with torch.no_grad():
        v_old = predict(x, sigma, "old")
        if args.anchor:
            v_ref = predict(x, sigma, None, args.anchor_guidance)
    v = predict(x, sigma, "policy")
    rho = implicit_reward(v, v_old, noise - x0)
    loss = crd_loss(rho, targets, args.group_size, args.beta, tau=args.tau)
    variance = rho.detach().view(-1, args.group_size).var(1, correction=0).mean()
    terms = {"crd_loss": loss, "rho_variance": variance, "loss": args.reward_weight * loss}
    if args.anchor:
        terms["anchor_loss"] = anchor_loss(v, v_ref, normalized_reward, args.anchor)
        terms["loss"] = terms["loss"] + terms["anchor_loss"]
    return terms


# LoRA and gradient checkpointing, by hand

ADAPTERS = ("policy", "ema", "old", "sampler")


class LoRALinear(nn.Module):
    """A frozen linear layer with low-rank updates, W x + alpha / rank B A x (arXiv 2106.09685).

    B is zero-initialized. `policy` is trained. The others start as its copies: averaging A and B
    comes close to averaging the updates B A only while the adapters are near each other.
    """

    def __init__(self, base, rank, alpha, adapters):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.active = "policy"  # None: as pretrained
        A = torch.randn(rank, base.in_features, device=base.weight.device) / rank
        B = torch.zeros(base.out_features, rank, device=base.weight.device)
        self.A = nn.ParameterDict({n: nn.Parameter(A.clone(), n == "policy") for n in adapters})
        self.B = nn.ParameterDict({n: nn.Parameter(B.clone(), n == "policy") for n in adapters})

    def forward(self, x):
        if self.active is None:
            return self.base(x)
        A = self.A[self.active].to(x.dtype)
        B = self.B[self.active].to(x.dtype)
        # 2-D, as a 3-D matmul can pick another kernel under autograd, and round differently.
        rows = x.flatten(0, -2)
        y = self.base(rows) + rows @ A.T @ (self.scale * B).T
        return y.view(*x.shape[:-1], -1)


def add_lora(model, target_modules, rank, alpha, adapters):
    """Freeze the model, wrap the linear layers whose names end in a target: {name: LoRALinear}."""
    model.requires_grad_(False)
    endings = tuple(f".{target}" for target in target_modules)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(endings):
            layers[name] = LoRALinear(module, rank, alpha, adapters)
            model.set_submodule(name, layers[name])
    return layers


@contextlib.contextmanager
def use_adapter(layers, name):
    """Compute with adapter `name`; None: as pretrained. Outside, `policy` is active, also while
    backward() recomputes a checkpointed block."""
    for layer in layers.values():
        layer.active = name
    try:
        yield
    finally:
        for layer in layers.values():
            layer.active = "policy"


@torch.no_grad()
def ema_update(layers, name, decay):
    """adapter = decay * adapter + (1 - decay) * policy, for A and for B."""
    for layer in layers.values():
        layer.A[name].lerp_(layer.A["policy"], 1 - decay)
        layer.B[name].lerp_(layer.B["policy"], 1 - decay)


def lora_state_dict(layers, adapter):
    """The tensors of an adapter by diffusers' names, the scale alpha / rank folded into B."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.A[adapter].detach().cpu()
        tensors[f"{name}.lora_B.weight"] = layer.scale * layer.B[adapter].detach().cpu()
    return tensors


def load_lora(layers, pipe, path, prefix):
    """Start every adapter from the LoRA in a folder, saved by this script or by diffusers."""
    tensors, *_, config = pipe.lora_state_dict(path, return_lora_metadata=True)
    config = config or {}  # peft's; this script folds the scale into B
    names = {f"{prefix}.{name}.lora_{part}.weight" for name in layers for part in "AB"}
    is_variant = config.get(f"{prefix}.use_rslora") or config.get(f"{prefix}.alpha_pattern")
    if tensors.keys() != names or is_variant:
        raise ValueError(f"{path} does not hold a plain LoRA of this model's layers")
    scale = config.get(f"{prefix}.lora_alpha", 1) / config.get(f"{prefix}.r", 1)
    for name, layer in layers.items():
        A = tensors[f"{prefix}.{name}.lora_A.weight"]
        B = tensors[f"{prefix}.{name}.lora_B.weight"] * scale / layer.scale
        for adapter in layer.A:
            layer.load_state_dict({f"A.{adapter}": A, f"B.{adapter}": B}, strict=False)


class Checkpoint(torch.autograd.Function):
    """Run a block, keep only its inputs, run it again in the backward pass (arXiv 1604.06174).

    The first run is without autograd, like sampling, so that both take the same kernels. Limits:
    no dropout, and no autocast around the forward pass alone, or the second run differs;
    `backward()`, not `torch.autograd.grad`: gradients of a block's weights go to their `.grad`.
    """

    @staticmethod
    def forward(ctx, block, trigger, *inputs):
        ctx.block = block
        ctx.inputs = inputs
        return block(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = []
        for x in ctx.inputs:
            is_tensor = isinstance(x, torch.Tensor)
            inputs.append(x.detach().requires_grad_(x.requires_grad) if is_tensor else x)
        ctx.inputs = None  # or they would live as long as the loss
        with torch.enable_grad():
            outputs = ctx.block(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        trained = [i for i, y in enumerate(outputs) if getattr(y, "requires_grad", False)]
        torch.autograd.backward([outputs[i] for i in trained], [grads[i] for i in trained])
        return None, None, *[getattr(x, "grad", None) for x in inputs]


def checkpoint(block, *inputs):
    """For `enable_gradient_checkpointing` of diffusers, which calls it for each block."""
    trigger = torch.ones((), requires_grad=True)  # or autograd ignores a block with frozen inputs
    return Checkpoint.apply(block, trigger, *inputs)


# Stable Diffusion 3: what to rewrite for another flow model

TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
BLOCKS = ("JointTransformerBlock",)
MULTIPLE = 16  # of an image's sides: 8 pixels to a latent, 2 latents to a patch


def load_pipeline(args, device):
    """The pretrained pipeline, frozen, its text encoders on the CPU; and the latents' shape."""
    kind = diffusers.StableDiffusion3Pipeline
    precision = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    parts = {}
    for name, value in kind.load_config(args.model).items():
        if value == [None, None]:  # such as T5 in tiny-sd3
            parts[name] = None
        elif name == "vae" or name.startswith(("transformer", "text_encoder")):
            part = getattr(importlib.import_module(value[0]), value[1])
            parts[name], report = part.from_pretrained(
                args.model, subfolder=name, dtype=torch.float32 if name == "vae" else frozen,
                low_cpu_mem_usage=False, output_loading_info=True,
            )  # fmt: skip
            missing = list(report["missing_keys"])  # the libraries only warn
            assert not missing, f"{args.model}: {name} lacks weights, {missing[:3]}"
    pipe = kind.from_pretrained(args.model, **parts)
    is_flow = isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    is_static = is_flow and not pipe.scheduler.config.use_dynamic_shifting
    assert is_static, f"{args.model}: not FlowMatchEulerDiscreteScheduler with a static shift"
    for p in pipe.transformer.parameters():  # diffusers looks at a file's first tensor alone
        p.data = p.data.to(frozen)  # and not at buffers: positions stay float32
    pipe.transformer.requires_grad_(False).to(device)
    pipe.vae.requires_grad_(False).to(device)
    height, width = args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor
    return pipe, (pipe.transformer.config.in_channels, height, width)


def schedule(pipe, steps, device):
    """The sigmas of a sampler (steps + 1,), from 1 down to 0."""
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas.to(device)


@torch.no_grad()
def encode(pipe, prompts, args):
    """N prompts -> [embeddings (N, L, D), pooled (N, P)]. The encoders visit the device."""
    device = pipe.vae.device
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    encoders = [encoder for encoder in encoders if encoder is not None]
    weights = [encoder.state_dict() for encoder in encoders]  # they stay on the CPU
    for encoder in encoders:
        encoder.to(device)
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device, do_classifier_free_guidance=False,
        max_sequence_length=args.max_sequence_length,
    )  # fmt: skip
    for encoder, tensors in zip(encoders, weights):
        encoder.load_state_dict(tensors, assign=True)  # drops the device's, copies nothing back
    return [embeds, pooled]


def velocity(pipe, x, sigma, cond, uncond=None, guidance=1.0):
    """v(x, sigma, c), or by classifier-free guidance v(uncond) + w (v(c) - v(uncond)).

    x (B, C, h, w) float32; sigma (); cond of B prompts, uncond of one "". (arXiv 2207.12598.)
    """
    if guidance != 1.0:
        both = [torch.cat([e.expand_as(c), c]) for e, c in zip(uncond, cond)]
        v_uncond, v_cond = velocity(pipe, torch.cat([x, x]), sigma, both).chunk(2)
        return v_uncond + guidance * (v_cond - v_uncond)
    x = x.to(pipe.transformer.dtype)
    timestep = (1000 * sigma).expand(len(x))
    return pipe.transformer(x, *cond, timestep, return_dict=False)[0].float()


@torch.no_grad()
def decode(pipe, latents):
    """Latents (N, C, h, w) -> N PIL images, eight at once."""
    if not latents.isfinite().all():
        raise FloatingPointError("latents are not finite: is there a NaN in the LoRA?")
    images = []
    config = pipe.vae.config
    for z in latents.split(8):
        pixels = pipe.vae.decode(z / config.scaling_factor + config.shift_factor).sample
        images += pipe.image_processor.postprocess(pixels)
    return images


# The run


bar = partial(tqdm, leave=False, disable=RANK > 0)


def batches(start, stop, size):
    """Slices of at most `size` images."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def predict(pipe, layers, cond, uncond, x, sigma, adapter, guidance=1.0):
    """The velocity by one of the adapters; None: as pretrained."""
    with use_adapter(layers, adapter):
        return velocity(pipe, x, sigma, cond, uncond, guidance)


@torch.no_grad()
def generate(pipe, layers, uncond, args, adapter, noise, cond, steps, guidance=1.0):
    """noise (N, ...) and the conditions of N prompts -> latents x0 (N, ...)."""
    sigmas = schedule(pipe, steps, noise.device)
    latents = []
    for rows in bar(batches(0, len(noise), args.micro_batch), "sample"):
        c = [part[rows] for part in cond]
        model = partial(predict, pipe, layers, c, uncond, adapter=adapter, guidance=guidance)
        latents.append(sample_ode(model, noise[rows], sigmas))
    return torch.cat(latents)


def train(args):
    """The paper's Algorithm 1. Returns the run's folder."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(hours=2))  # the others wait while 0 evaluates
    folder = Path(args.resume or f"runs/{args.name}")
    K = args.group_size
    N = args.groups * K // WORLD_SIZE  # images per epoch of this process
    can_run = device.type != "cpu" or args.device or Path(args.model).exists()
    assert can_run, f"{args.model} needs a GPU, and there is none here: try --preset tiny"
    is_free = RANK or args.resume or not folder.exists()
    assert is_free, f"{folder} exists: --resume it, or choose another --name"
    is_multiple = args.height % MULTIPLE == args.width % MULTIPLE == 0
    assert is_multiple, f"--height and --width: multiples of {MULTIPLE} only"
    assert args.groups % (args.steps_per_epoch * WORLD_SIZE) == 0, "--groups: do not divide evenly"
    assert args.micro_batch % K == 0 and K > 1, "--micro-batch: no multiple of --group-size > 1"
    assert len(args.old_decay) == len(args.sampler_decay) == 4, "--old-decay takes four numbers"

    if args.wandb and RANK == 0:
        import wandb

        project, _, run_id = args.wandb.partition("/")
        options = {"name": folder.name, "config": asdict(args), "resume": "allow"}
        run = wandb.init(project=project, id=run_id or None, **options)
        args.wandb = f"{project}/{run.id}"  # where a resumed run goes on

    # Prompts, and rewards that can score them
    source = args.prompts or rewards.default_prompts(args.reward)
    held_out = rewards.held_out_prompts(source, args.eval_images, args.eval_prompts)
    if args.epochs:
        next(rewards.prompts(source, "train", args.seed, args.eval_prompts))  # if any is left
    rewards.check(args.eval_rewards or args.reward, held_out)
    reward = rewards.load(args.reward, device, held_out + rewards.read_prompts(source))
    if args.eval_rewards and RANK == 0:  # only process 0 evaluates
        held_out_reward = rewards.load(args.eval_rewards, device)

    # The model, its adapters, the optimizer of the first
    torch.manual_seed(args.seed)
    pipe, shape = load_pipeline(args, device)
    uncond = encode(pipe, [""], args)
    held_out_cond = encode(pipe, [prompt for prompt, _ in held_out], args)
    layers = add_lora(pipe.transformer, TARGET_MODULES, args.rank, args.alpha, ADAPTERS)
    state_file = folder / "state.pt"
    if args.lora and not state_file.exists():
        load_lora(layers, pipe, args.lora, "transformer")
    if args.compile:
        for block in pipe.transformer.modules():
            if type(block).__name__ in BLOCKS:
                block.compile(recompile_limit=64)  # beyond, it would run eagerly
    if args.grad_checkpoint:
        pipe.transformer.enable_gradient_checkpointing(checkpoint)
    sample = partial(generate, pipe, layers, uncond, args)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-4)

    # A new run, or one that goes on where its state was last saved
    progress = {"epoch": 0, "step": 0, "images": 0, "seconds": 0.0}
    metrics = []  # the lines of metrics.jsonl
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        unknown = pipe.transformer.load_state_dict(state["adapters"], strict=False).unexpected_keys
        assert not unknown, f"{folder} has trained another model: {unknown[:3]}"
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = args.lr
        progress = state["progress"]
        metrics = state["metrics"]
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))

    def log(split, R, values):
        values = {"reward": R.mean().item(), **values}
        metrics.append({"split": split, **progress, **values})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"epoch {progress['epoch']:3d} {split:5s}  {numbers}")

    def evaluate():
        """Draw held-out prompts with `ema`, always from the same noise; score, save, show them."""
        noise = torch.randn(len(held_out), *shape, generator=torch.Generator().manual_seed(1234))
        noise = noise.to(device)
        x0 = sample("ema", noise, held_out_cond, args.eval_steps, args.eval_guidance)
        images = decode(pipe, x0)
        R, values = reward.score(images, *zip(*held_out))
        if args.eval_rewards:
            values |= held_out_reward.score(images, *zip(*held_out))[1]
        log("eval", R, values)
        out = folder / f"epoch-{progress['epoch']:04d}"
        pipe.save_lora_weights(out, transformer_lora_layers=lora_state_dict(layers, "ema"))
        rewards.contact_sheet(out / "images.png", images, R.tolist(), held_out)
        rewards.plot_curve(folder / "curve.png", metrics)

    sent = len(metrics)  # to Weights & Biases
    if progress["epoch"] == 0 and RANK == 0:
        evaluate()
    sigmas = schedule(pipe, args.rollout_steps, device)
    epochs = range(progress["epoch"], args.epochs)
    for epoch in bar(epochs, folder.name, args.epochs, initial=epochs.start, leave=True):
        clock = [time.perf_counter()]
        seed = random.Random(f"{args.seed} {epoch} {RANK}").getrandbits(63)
        generator = torch.Generator(device).manual_seed(seed)

        # 1. Roll out: K images of each prompt with `sampler`, without guidance.
        stream = rewards.prompts(source, "train", seed, eval_file=args.eval_prompts)
        pairs = list(itertools.islice(stream, N // K))
        cond = [c.repeat_interleave(K, 0) for c in encode(pipe, [p for p, _ in pairs], args)]
        noise = torch.randn(N, *shape, generator=generator, device=device)
        x0 = sample("sampler", noise, cond, args.rollout_steps)
        images = decode(pipe, x0)
        clock.append(time.perf_counter())

        # 2. Score.
        prompts, metadata = zip(*[pair for pair in pairs for _ in range(K)])
        R, values = reward.score(images, prompts, metadata)
        normalized_reward = rewards.normalize(R, reward.range).to(device)
        if not args.anchor_adaptive:
            normalized_reward = torch.ones_like(normalized_reward)
        shards = [(R, values)] * WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_gather_object(shards, (R, values))
        R = torch.cat([R for R, _ in shards])
        values = {name: fmean(v[name] for _, v in shards if name in v) for name in values}
        own = slice(RANK * N, (RANK + 1) * N)
        targets = reward_targets(R, K)[own].to(device)
        clock.append(time.perf_counter())

        # 3. Train: each optimizer step on a share of the groups, at some of the rollout's sigmas.
        totals = defaultdict(float)
        images_per_step = N // args.steps_per_epoch
        for start in bar(range(0, N, images_per_step), "train"):
            order = torch.randperm(args.rollout_steps, generator=generator, device=device)
            steps = order[: args.train_timesteps].tolist()
            micro_batches = batches(start, start + images_per_step, args.micro_batch)
            for i, rows in itertools.product(steps, micro_batches):
                noise = torch.randn(x0[rows].shape, generator=generator, device=device)
                predict_rows = partial(predict, pipe, layers, [c[rows] for c in cond], uncond)
                s, n = targets[rows], normalized_reward[rows]
                terms = objective(predict_rows, x0[rows], noise, sigmas[i], s, n, args)
                share = len(noise) / images_per_step / len(steps)
                (share * terms["loss"]).backward()
                for name, term in terms.items():
                    totals[name] += share / args.steps_per_epoch * term.detach()
            if WORLD_SIZE > 1:
                gradients = [p.grad for p in parameters]
                flat = nn.utils.parameters_to_vector(gradients)
                dist.all_reduce(flat)
                nn.utils.vector_to_parameters(flat / WORLD_SIZE, gradients)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            totals["grad_norm"] += norm / args.steps_per_epoch
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] += 1
            warm_up = (1 + progress["step"]) / (10 + progress["step"])
            ema_update(layers, "ema", min(args.ema, warm_up))

        # 4. Let `old` and `sampler` follow the policy.
        ema_update(layers, "old", ema_decay(progress["step"], *args.old_decay))
        ema_update(layers, "sampler", ema_decay(progress["step"], *args.sampler_decay))
        clock.append(time.perf_counter())

        # 5. Log, evaluate, save.
        progress["epoch"] += 1
        progress["images"] += len(R)
        progress["seconds"] += clock[-1] - clock[0]
        values |= {name: total.item() for name, total in totals.items()}
        values["rho_std"] = values.pop("rho_variance") ** 0.5  # within a group
        for i, phase in enumerate(("rollout", "reward", "train")):
            values[f"{phase}_seconds"] = clock[i + 1] - clock[i]
        if device.type == "cuda":
            values["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if RANK > 0:
            continue
        log("train", R, values)
        if progress["epoch"] % args.eval_every == 0 or progress["epoch"] == args.epochs:
            evaluate()
        tensors = pipe.transformer.state_dict()
        adapters = {name: tensors[name] for name in tensors if name.endswith(ADAPTERS)}
        state = {"adapters": adapters, "optimizer": optimizer.state_dict()}
        state |= {"progress": progress, "metrics": metrics}
        torch.save(state, folder / "state.aside")
        (folder / "state.aside").replace(state_file)
        if args.wandb:
            for line in metrics[sent:]:
                wandb.log({f"{line['split']}/{name}": line[name] for name in line})
            sent = len(metrics)
    if WORLD_SIZE > 1:
        dist.barrier()
        dist.destroy_process_group()
    return folder


def parse(argv=None):
    """Settings from the command line: flags over a preset's defaults, or over a resumed run's."""
    parser = HfArgumentParser(Settings, description=__doc__.splitlines()[0])
    flags = parser.parse_args(argv)
    names = [name for name, _, _ in rewards.parse_spec(flags.reward)]
    preset = flags.preset or ("ocr" if "ocr" in names else "geneval")
    name = f"crd-{flags.preset or '-'.join(names)}-seed{flags.seed}"
    parser.set_defaults(**{"preset": preset, "name": name, **PRESETS[preset]})
    if flags.resume:
        saved = json.loads(Path(flags.resume, "args.json").read_text())
        is_ours = saved.keys() == asdict(Settings()).keys()
        assert is_ours, f"{flags.resume} holds no run of crd.py"
        parser.set_defaults(**saved)
    return parser.parse_args_into_dataclasses(argv)[0]


if __name__ == "__main__":
    train(parse())
