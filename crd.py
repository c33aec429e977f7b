"""CRD, Centered Reward Distillation (Zhu et al. 2026, arXiv 2603.14128), in one file.

Fine-tune a flow-matching text-to-image model so that its images score higher under any reward.
What a reader who knows PPO would not expect:

1. In place of a clipped policy gradient, a regression: the log-ratio of the policy to an older
   self, `old`, is fitted to the reward.
2. No trajectories: a finished image is noised and its velocity predicted, at several noise levels,
   so any ODE sampler will do.
3. No classifier-free guidance in sampling: instead, a penalty, the anchor, pulls the policy toward
   what the pretrained model does with guidance. It is weak where the reward is low and there is
   much to learn, and strong where it is high, against reward hacking.

Why it works: max_p E_p[R] - beta KL(p || p_old) has the optimum p* = p_old exp(R / beta) / Z, so
R = beta log(p* / p_old) + beta log Z for any image, whoever drew it. Z is intractable but depends
on the prompt alone: subtract from both sides their mean over a group, K images of one prompt, and
log Z cancels. What is left is a regression of log-ratios on rewards.

    x0, noise, sigma   an image's latents, Gaussian noise, noise level in [0, 1]
    x                  the noised image (1 - sigma) x0 + sigma noise
    u                  its velocity, noise - x0
    v, v_old           u as predicted by the policy, and by `old`
    v_ref              u as predicted by the pretrained model with guidance: the anchor's target
    rho                how much better than `old` the policy denoises: a proxy for log(p / p_old)
    mean               over an image's latents; mean_i over images, mean_K over a group
    R                  an image's reward
    A                  its advantage, (R - mean_K R) / (std over the epoch), clipped to +-clip (5)
    s                  A / (2 clip) + 1/2, in [0, 1]: stands for R in the loss; the 1/2 cancels
    n                  R scaled to [0, 1] by the range the reward declares: how good the image is
    kappa              weight of the anchor where n = 1; kappa_min, 1e-4, where n = 0

    rho = mean (v_old - u)^2 / m_old - mean (v - u)^2 / m,                         implicit_reward
          with m = mean |v - u| and m_old = mean |v_old - u|, detached, a heuristic that brings
          the errors of all noise levels closer together
    L   = (clip / beta) mean_i [beta (rho_i - mean_K rho) - (s_i - mean_K s)]^2           crd_loss
          + mean_i kappa_i mean (v - v_ref)^2,  where kappa_i grows with n_i           anchor_loss

L is computed at one noise level; an optimizer step averages it over several that sampling passes
through. If no A is clipped, s - mean_K s = A / (2 clip), so the first term pulls rho_i - mean_K rho
to A_i / (2 clip beta). (As s is not R, and rho has a scale of its own at each level, beta is no
longer the KL's exact weight.) The factor clip / beta makes the first term's gradient a policy
gradient where rho = 0, as in a run's first step:

    (clip / beta) mean_i [-2 beta A_i / (2 clip) grad (rho_i - mean_K rho)] = -mean_i A_i grad rho_i

where grad mean_K rho drops out, as the A of a group, if none is clipped, sum to 0.

One frozen model carries four LoRA adapters. The last three are moving averages of the first:

    policy    trained
    ema       follows after every optimizer step; evaluated and saved
    old       follows once per epoch and stays behind, so that rho, and with it L's limit on
              drift, spans several epochs
    sampler   draws the images; follows once per epoch, at least as closely as `old`, so that
              early on they are nearly the current policy's (the loss would accept any)

An epoch (train_epoch) draws K images of each prompt with `sampler` (generate), turns their rewards
into s (reward_targets), takes optimizer steps (objective), and moves `old` and `sampler` toward
the policy (ema_update). The order of this file: settings; the mathematics; LoRA, and Stable
Diffusion 3 (skip both at first); the algorithm; the run around it.

    python crd.py --preset tiny    # the bundled toy model, in minutes on any CPU
    python crd.py --reward ocr     # Stable Diffusion 3.5 Medium learns to spell, on one GPU
"""

import contextlib
import importlib
import inspect
import itertools
import json
import math
import os
import random
import shutil
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

if not hasattr(rewards, "parse_spec"):  # another module of that name comes first on the path
    raise ImportError(f"{rewards.__file__} is not the rewards.py that belongs to this script")

PROCESS = int(os.environ.get("RANK", 0))  # set by torchrun
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
TINY = str(Path(__file__).resolve().parent / "tiny-sd3")
SCENES = f"{TINY}/scenes"
DECAY_HELP = (
    "START_STEP START_VALUE SLOPE END_VALUE of this adapter's decay: at the end of an epoch, after "
    "t optimizer steps in all, it is START_VALUE if t < START_STEP, else START_VALUE + SLOPE "
    "(t - START_STEP), at most END_VALUE; 0 copies the policy, 1 changes nothing"
)


def arg(default, help):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Everything a run depends on. These defaults are preset `ocr`'s; other presets change some.
    Flags override them all."""

    # model
    preset: Literal["ocr", "geneval", "tiny", "scenes"] | None = arg(
        None, "which defaults to change; if not given, ocr if --reward has ocr, else geneval"
    )
    model: str = arg("stabilityai/stable-diffusion-3.5-medium", "folder or repo")
    dtype: Literal["bf16", "fp32"] | None = arg(None, "default: bf16 on CUDA only")
    height: int = arg(512, "in pixels")
    width: int = arg(512, "in pixels")
    max_sequence_length: int = arg(128, "T5 tokens per prompt")
    rank: int = arg(32, "LoRA rank")
    alpha: float = arg(64, "the LoRA scale is alpha / rank")
    lora: str | None = arg(None, "folder of a LoRA to start from; the anchor is without it")
    # rollout
    reward: str = arg("ocr", "name[@path-or-repo][:weight]; a sum of several, joined by commas")
    prompts: str | None = arg(None, "a set such as geneval, or a file; default: the reward's own")
    groups: int = arg(48, "prompts per epoch, over all processes")
    group_size: int = arg(24, "images per prompt, K")
    rollout_steps: int = arg(10, "ODE steps of a rollout")
    # loss
    beta: float = arg(1.0, "strength of the KL to `old`, by scaling rho in the loss")
    tau: float = arg(
        math.inf, "temperature of weights in mean_K, see `crd_loss`; inf: equal weights"
    )
    reward_weight: float = arg(1.0, "weight of the CRD loss; 0: the anchor alone")
    anchor: float = arg(0.1, "kappa, the anchor's largest weight; 0: no anchor")
    anchor_guidance: float = arg(4.5, "guidance of the anchor; 1: unguided")
    anchor_adaptive: bool = arg(True, "the anchor grows with the reward; else n = 1 for all images")
    train_timesteps: int = arg(9, "noise levels in an optimizer step, at most all of the rollout's")
    # optimization
    epochs: int = arg(300, "in all; 0: only evaluate")
    steps_per_epoch: int = arg(2, "optimizer steps; the groups are split evenly among them")
    micro_batch: int = arg(24, "images at once, at most; whole groups")
    lr: float = arg(3e-4, "AdamW learning rate; weight decay 1e-4, gradient norm at most 1")
    old_decay: list[float] = arg([0, 0.25, 0.005, 0.999], DECAY_HELP)
    sampler_decay: list[float] = arg([75, 0.0, 0.0075, 0.999], DECAY_HELP)
    ema: float = arg(0.9, "decay of `ema`, at most: (1 + n) / (10 + n) after n optimizer steps")
    grad_checkpoint: bool = arg(True, "recompute blocks in the backward pass")
    compile: bool = arg(False, "torch.compile each transformer block")
    # run
    name: str | None = arg(None, "folder runs/NAME; default: crd-(PRESET or else REWARD)-seedSEED")
    seed: int = arg(0, "same seed, same run, as far as the device's kernels are deterministic")
    device: str | None = arg(None, "default: cuda if there is one")
    eval_every: int = arg(10, "epochs between evaluations")
    eval_images: int = arg(128, "held-out prompts, which repeat if there are fewer; noise is fixed")
    eval_steps: int = arg(40, "ODE steps of an evaluation")
    eval_guidance: float = arg(1.0, "guidance of evaluations; rollouts have none")
    eval_rewards: str | None = arg(None, "rewards to log that are not trained on, like --reward")
    eval_prompts: str | None = arg(None, "evaluate on this file's prompts, however many")
    resume: str | None = arg(None, "continue the run in this folder")
    wandb: str | None = arg(None, "also log to this Weights & Biases project")


PRESETS = {
    # Paper, Table 3. `sampler` copies the policy up to epoch 37. From 105 on it and `old` are
    # nearly frozen, against drift: images become off-policy, which the loss allows.
    "ocr": dict(),
    # From the authors' code. `old` and `sampler` keep moving: after each epoch, at least half of
    # the way to the policy.
    "geneval": dict(
        reward="geneval", steps_per_epoch=1,
        old_decay=[0, 0.25, 0.001, 0.5], sampler_decay=[0, 0, 0.001, 0.5],
    ),
    # The toys, also `scenes`, have no T5. diffusers takes zeros for its tokens: one token will do.
    "tiny": dict(
        model=TINY, device="cpu", height=32, width=64, max_sequence_length=1, rank=16, alpha=32,
        reward=f"ocr@{TINY}", prompts="signs", group_size=8, rollout_steps=6,
        anchor_guidance=4.0, train_timesteps=6, epochs=24, steps_per_epoch=12, micro_batch=64,
        lr=3e-3, ema=0.97, old_decay=[0, 0.25, 0.01, 0.9], sampler_decay=[0, 0, 0.001, 0.5],
        grad_checkpoint=False, eval_every=8, eval_images=512, eval_steps=10,
        eval_rewards=f"ocr@{TINY}/judge,clipscore@{TINY}/clip,color",
    ),
}  # fmt: skip
PRESETS["scenes"] = PRESETS["tiny"] | dict(
    model=SCENES, reward=f"geneval@{SCENES}", prompts=f"{SCENES}/prompts.jsonl",
    eval_prompts=f"{SCENES}/eval.jsonl", eval_rewards=f"geneval@{SCENES}/judge",
    anchor=0.25, lr=1.5e-3,
)  # fmt: skip


# The mathematics. Latents have any shape (B, ...); the K images of a group are consecutive.


def reward_targets(R, group_size, clip=5.0):
    """s = A / (2 clip) + 1/2, with A = (R - mean_K R) / (std R + 1e-4) clipped to +-clip.

    R (N,), whole groups -> s (N,) in [0, 1]. The mean is over the group, as Z depends on the
    prompt; the standard deviation is over all N, so that a prompt whose rewards differ little
    counts little. The 1/2, from DiffusionNFT, cancels in crd_loss.
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

    By the ELBO, the negative denoising error is a proxy for the log-likelihood (paper, sec. 3).
    Dividing by m = mean |v - u|, detached, brings errors of all noise levels closer together, a
    heuristic of DiffusionNFT (arXiv 2509.16117). v_old is computed without gradients.
    """

    def weighted_error(prediction):
        # In float32: in bf16 rho would be less than its rounding errors.
        error = (prediction.float() - u.float()).flatten(1)
        m = error.abs().mean(1).detach().clamp(min=1e-5)
        return error.square().mean(1) / m

    return weighted_error(v_old) - weighted_error(v)


def crd_loss(rho, s, group_size, beta=1.0, clip=5.0, tau=math.inf):
    """(clip / beta) mean_i [beta (rho_i - mean_K rho) - (s_i - mean_K s)]^2; rho, s (B,), the K
    images of a group consecutive. clip: as in reward_targets, where s = A / (2 clip) + 1/2.

    If tau is finite (an option of the paper's, in no preset), mean_K has weights. softmax(s / tau)
    compares images with the best of their group, softmax(-s / tau) with the worst; the loss is the
    mean of both. Z cancels with any weights that sum to 1.
    """
    rho = rho.view(-1, group_size)
    s = s.view(-1, group_size)

    def loss(weights):  # (groups, K), or 1 / K for all
        # Detached, as in the paper. With equal weights the gradient is the same either way, as
        # the residuals of a group sum to 0.
        mean_rho = (weights * rho.detach()).sum(1, keepdim=True)
        mean_s = (weights * s).sum(1, keepdim=True)
        residual = beta * (rho - mean_rho) - (s - mean_s)
        return clip / beta * residual.square().mean()

    if tau == math.inf:
        return loss(1 / group_size)
    return (loss(torch.softmax(s / tau, 1)) + loss(torch.softmax(-s / tau, 1))) / 2


def anchor_loss(v, v_ref, n, kappa, kappa_min=1e-4):
    """mean_i kappa_i mean (v - v_ref)^2, with kappa_i = kappa_min + n_i (kappa - kappa_min).

    The penalty is weak where the reward, n (B,) in [0, 1], is low and the policy has much to learn;
    it is strong where the reward is high and may be exploited. v_ref is computed without gradients.
    """
    kappas = kappa_min + n * (kappa - kappa_min)
    error = (v.float() - v_ref.float()).flatten(1)
    return (kappas * error.square().mean(1)).mean()


def ema_decay(step, start_step, start_value, slope, end_value):
    """start_value until optimizer step start_step, then a rise by slope a step up to end_value."""
    if step < start_step:
        return start_value
    return min(start_value + slope * (step - start_step), end_value)


def sample_ode(velocity, noise, sigmas):
    """Integrate dx / dsigma = v from noise to an image, by DPM-Solver++(2M) (arXiv 2211.01095).

    velocity: a function of x (B, ...) and sigma (); noise (B, ...); sigmas (S + 1,), descending to
    0. A step is x_next = D + sigma_next / sigma (x - D). Euler's method has D = x0, the image
    predicted from x. Here D is extrapolated from the last two x0 to the middle of the step, on the
    scale of log((1 - sigma) / sigma).
    """
    if sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must descend to 0, not {sigmas.tolist()}")
    gaps = torch.log((1 - sigmas) / sigmas).diff().tolist()
    x = noise
    last_x0 = None
    last_gap = math.inf
    for sigma, sigma_next, gap in zip(sigmas[:-1], sigmas[1:], gaps):
        x0 = x - sigma * velocity(x, sigma)
        D = x0
        # Extrapolate, but not in the first step; not after or across an infinite gap, that from
        # sigma 1 or to 0; and not over more than twice the last gap, where it can do harm.
        if last_gap < math.inf and gap <= 2 * last_gap:
            D = x0 + gap / last_gap / 2 * (x0 - last_x0)
        x = D + sigma_next / sigma * (x - D)
        last_x0 = x0
        last_gap = gap
    return x


# LoRA and gradient checkpointing, by hand: where adapters are equal, rho has to be exactly 0, so
# passes with and without gradients have to round alike. (The same lines are in ddpo.py.)

ADAPTERS = ("policy", "ema", "old", "sampler")


class LoRALinear(nn.Module):
    """A linear layer with low-rank updates, W x + alpha / rank B A x (arXiv 2106.09685).

    W is frozen by add_lora; A starts Gaussian, as in peft's "gaussian", and B as 0. `policy` is
    trained; the other adapters start as copies of it.
    """

    def __init__(self, base, rank, alpha, adapters):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.active = "policy"  # None: as pretrained
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        A = torch.randn(rank, base.in_features, device=base.weight.device) / rank
        B = torch.zeros(base.out_features, rank, device=base.weight.device)
        for name in adapters:
            self.lora_A[name] = nn.Parameter(A.clone(), requires_grad=name == "policy")
            self.lora_B[name] = nn.Parameter(B.clone(), requires_grad=name == "policy")

    def forward(self, x):
        if self.active is None:
            return self.base(x)
        A = self.lora_A[self.active].to(x.dtype)
        B = self.lora_B[self.active].to(x.dtype)
        # Flattened to 2-D: a 3-D matmul can pick another kernel under autograd. A difference in
        # rounding would count as a change of the policy.
        rows = x.flatten(0, -2)
        y = self.base(rows) + rows @ A.T @ (self.scale * B).T
        return y.view(*x.shape[:-1], -1)


def add_lora(network, target_modules, rank, alpha, adapters):
    """Freeze a network and wrap the linear layers whose names end in a target. -> {name: layer}"""
    network.requires_grad_(False)
    endings = tuple(f".{target}" for target in target_modules)
    layers = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(endings):
            layers[name] = LoRALinear(module, rank, alpha, adapters)
            network.set_submodule(name, layers[name])
    return layers


@contextlib.contextmanager
def use_adapter(layers, name):
    """Compute with adapter `name`; None: as pretrained. Only under no_grad: backward() would
    recompute checkpointed blocks (below) with `policy`."""
    for layer in layers.values():
        layer.active = name
    try:
        yield
    finally:
        for layer in layers.values():
            layer.active = "policy"


@torch.no_grad()
def ema_update(layers, name, decay):
    """adapter = decay * adapter + (1 - decay) * policy, for A and for B. That is not quite the
    average of B A, but close to it while the two adapters, which started as copies, are close."""
    for layer in layers.values():
        layer.lora_A[name].lerp_(layer.lora_A["policy"], 1 - decay)
        layer.lora_B[name].lerp_(layer.lora_B["policy"], 1 - decay)


def adapter_tensors(layers, adapter):
    """The tensors of an adapter by diffusers' names, the scale alpha / rank folded into B."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[adapter].detach().cpu()
        tensors[f"{name}.lora_B.weight"] = layer.scale * layer.lora_B[adapter].detach().cpu()
    return tensors


def adapter_state(network):
    """All adapters' tensors by the network's names, such as x.lora_A.policy, for state.pt."""
    tensors = network.state_dict()
    return {name: tensors[name] for name in tensors if name.split(".")[-1] in ADAPTERS}


def load_lora(layers, pipe, path, prefix):
    """Start every adapter from the LoRA in a folder, saved by this script or by diffusers. prefix:
    the network's name in the pipeline."""
    # Some pipelines also return a dict of alphas, the scales of other formats.
    tensors, *alphas, config = pipe.lora_state_dict(path, return_lora_metadata=True)
    config = config or {}  # peft's settings, which our files lack
    names = {f"{prefix}.{name}.lora_{part}.weight" for name in layers for part in "AB"}
    is_variant = config.get(f"{prefix}.use_rslora") or config.get(f"{prefix}.alpha_pattern")
    if tensors.keys() != names or is_variant or any(alphas):
        raise ValueError(f"{path} does not hold a plain LoRA of this model's layers")
    for name, layer in layers.items():
        A = tensors[f"{prefix}.{name}.lora_A.weight"]
        B = tensors[f"{prefix}.{name}.lora_B.weight"]
        if A.shape != layer.lora_A["policy"].shape:
            raise ValueError(f"{path} has rank {len(A)} in {name}: set --rank, the same for all")
        # The file's update is scale B A. (Files of these scripts state no lora_alpha: their B
        # contains the scale, and the default gives 1.) The layer multiplies by its own scale.
        scale = config.get(f"{prefix}.lora_alpha", len(A)) / len(A)
        B = B * scale / layer.scale
        for adapter in layer.lora_A:
            new = {f"lora_A.{adapter}": A, f"lora_B.{adapter}": B}
            layer.load_state_dict(new, strict=False)


class Checkpoint(torch.autograd.Function):
    """Run a block, keep only its inputs, run it again in the backward pass (arXiv 1604.06174).

    Why not torch.utils.checkpoint? Its non-reentrant variant runs the forward pass with gradients
    enabled, where kernels can round differently than without, as if the policy had changed. The
    reentrant one gives no gradient to a block whose inputs need none. In an autograd.Function like
    this one the forward pass runs with gradients disabled, as it does in sampling; and `trigger`, a
    tensor that requires a gradient, makes autograd call back.

    Limits: dropout, autocast around the forward pass alone, or another active adapter would make
    the second run differ. Inputs are positional; a tensor within a list gets no gradient. Gradients
    of a block's weights go to `.grad`: call `backward()`, once; not `torch.autograd.grad`.
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
        # No output is tracked if a block has no LoRA and its inputs need no gradient.
        tracked = [i for i, y in enumerate(outputs) if getattr(y, "requires_grad", False)]
        torch.autograd.backward([outputs[i] for i in tracked], [grads[i] for i in tracked])
        return None, None, *[getattr(x, "grad", None) for x in inputs]


def checkpoint(block, *inputs):
    """For `enable_gradient_checkpointing` of diffusers, which calls it for each block."""
    return Checkpoint.apply(block, torch.ones((), requires_grad=True), *inputs)


# Stable Diffusion 3: what to rewrite for another flow model. The contract:
#   load_pipeline   gives the pipeline and the shape of an image's latents, as the pipeline takes
#                   them. If they are packed, keep height and width on `pipe`, for `decode`. Outside
#                   of this section the network is `pipe.transformer`
#   schedule        gives the pipeline's own sigmas, from 1, noise, to 0
#   encode          gives tensors, N in front, whose other sizes are the same in every call: pad to
#                   --max-sequence-length. Where a network takes a mask, give it one every time
#   velocity        is noise - x0, in float32, guided as the pipeline does it. A guidance embedding,
#                   as FLUX has, gets the pipeline's default; --anchor-guidance comes on top of it
# To compare the section with the pipeline in a folder:
# MODEL=folder python -m pytest -q -k "section and crd-" test_crd.py

TARGET_MODULES = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
BLOCKS = ("JointTransformerBlock",)
SIDE_MULTIPLE = 16  # 8 pixels to a row of latents (the toys': 4), 2 rows to a patch


def expect(path, settings, **expected):
    """Raise ValueError if a model has a setting that would be ignored here."""
    for name, values in expected.items():
        value = settings.get(name, values[0])
        if value not in values:
            options = " or ".join(str(x) for x in values)
            raise ValueError(f"{path} is not for this script: {name} is {value}, not {options}")


def part_class(config, name):
    """The class of a part of a pipeline, by model_index.json."""
    module, class_name = config[name]
    return getattr(importlib.import_module(module), class_name)


def load_parts(path, config, dtype):
    """The parts of a pipeline that have weights, frozen; None for those that are not used.

    One by one, as a pipeline's `from_pretrained` only warns of weights that a file lacks, and
    leaves them random.
    """
    parts = {}
    for name, value in config.items():
        is_unused = name in ("safety_checker", "feature_extractor", "image_encoder")
        if is_unused or value == [None, None]:  # left out of the folder, as T5 may be
            parts[name] = None
        elif name.startswith(("transformer", "unet", "vae", "text_encoder")):
            part = part_class(config, name)
            part_dtype = torch.float32 if name == "vae" else dtype
            in_float32 = set(getattr(part, "_keep_in_fp32_modules", None) or ())
            # low_cpu_mem_usage is False, as True would round buffers such as positions to bf16. But
            # diffusers insists on True for classes with parts to keep in float32.
            parts[name], report = part.from_pretrained(
                path, subfolder=name, dtype=part_dtype, output_loading_info=True,
                low_cpu_mem_usage=bool(in_float32),
            )  # fmt: skip
            if missing := list(report["missing_keys"]):
                raise ValueError(f"{path}: {name} lacks weights, {missing[:3]}")
            for key, p in parts[name].requires_grad_(False).named_parameters():
                # diffusers decides by a file's first tensor whether to cast: cast the others here.
                if in_float32.isdisjoint(key.split(".")):
                    p.data = p.data.to(part_dtype)
    return parts


def load_pipeline(args, device):
    """The pretrained pipeline, its text encoders still on the CPU, and the shape of latents."""
    config = diffusers.DiffusionPipeline.load_config(args.model)
    expect(args.model, config, _class_name=["StableDiffusion3Pipeline"])
    scheduler = part_class(config, "scheduler").from_pretrained(args.model, subfolder="scheduler")
    transformer_config = part_class(config, "transformer").load_config(
        args.model, subfolder="transformer"
    )
    vae_config = part_class(config, "vae").load_config(args.model, subfolder="vae")
    expect(
        args.model, scheduler.config, _class_name=["FlowMatchEulerDiscreteScheduler"],
        use_dynamic_shifting=[False], invert_sigmas=[False], stochastic_sampling=[False],
    )  # fmt: skip
    expect(args.model, transformer_config, in_channels=[vae_config["latent_channels"]])
    precision = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parts = load_parts(args.model, config, dtype)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(args.model, **parts)
    pipe.transformer.to(device)
    pipe.vae.to(device)
    scale = pipe.vae_scale_factor
    return pipe, (vae_config["latent_channels"], args.height // scale, args.width // scale)


def schedule(pipe, steps, shape, device):
    """The solver's sigmas (steps + 1,), from 1 to 0. (SD3's are the same for any shape.)"""
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas.to(device)


@torch.no_grad()
def encode(pipe, prompts, args):
    """N prompts -> [embeddings (N, tokens, width), pooled (N, width)]. The text encoders are on the
    device only here."""
    device = pipe.vae.device
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    encoders = [encoder for encoder in encoders if encoder is not None]
    for encoder in encoders:
        encoder.to(device)
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device, do_classifier_free_guidance=False,
        max_sequence_length=args.max_sequence_length,
    )  # fmt: skip
    for encoder in encoders:
        encoder.to("cpu")
    return [embeds, pooled]


def velocity(pipe, x, sigma, cond, uncond=None, guidance=1.0):
    """v(x, sigma, cond); with guidance, v(uncond) + guidance (v(cond) - v(uncond)).

    x (B, C, h, w), sigma () -> (B, C, h, w) float32. cond: what `encode` gives for B prompts;
    uncond: the same for one empty prompt. (Classifier-free guidance, arXiv 2207.12598.)
    """
    if guidance != 1.0:
        both = [torch.cat([e.expand_as(c), c]) for e, c in zip(uncond, cond)]
        v_uncond, v_cond = velocity(pipe, torch.cat([x, x]), sigma, both).chunk(2)
        return v_uncond + guidance * (v_cond - v_uncond)
    x = x.to(pipe.transformer.dtype)
    timestep = (pipe.scheduler.config.num_train_timesteps * sigma).expand(len(x))
    return pipe.transformer(x, *cond, timestep, return_dict=False)[0].float()


@torch.no_grad()
def decode(pipe, latents):
    """Latents (N, C, h, w) -> N PIL images, eight at once."""
    if not latents.isfinite().all():
        raise FloatingPointError(
            "latents are not finite: does the LoRA hold a NaN, or has training diverged?"
        )
    images = []
    config = pipe.vae.config
    for z in latents.split(8):
        pixels = pipe.vae.decode(z / config.scaling_factor + (config.shift_factor or 0)).sample
        images += pipe.image_processor.postprocess(pixels)
    return images


# The algorithm

bar = partial(tqdm, leave=False, disable=PROCESS > 0)


def batches(start, stop, size):
    """Slices of at most `size` images."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


@torch.no_grad()
def generate(pipe, layers, adapter, noise, cond, uncond, steps, guidance, micro_batch):
    """Draw with an adapter: noise (N, ...), cond of N prompts -> latents x0 (N, ...)."""
    sigmas = schedule(pipe, steps, noise.shape[1:], noise.device)
    latents = []
    with use_adapter(layers, adapter):
        for rows in bar(batches(0, len(noise), micro_batch), "sample"):
            c = [part[rows] for part in cond]
            predict = partial(velocity, pipe, cond=c, uncond=uncond, guidance=guidance)
            latents.append(sample_ode(predict, noise[rows], sigmas))
    return torch.cat(latents)


def objective(v, v_old, v_ref, u, s, n, args):
    """{name: scalar tensor}: "loss" is L with its first term times reward_weight, for whole groups
    at one sigma; the rest is only logged. Without an anchor v_ref is None."""
    rho = implicit_reward(v, v_old, u)
    terms = {"crd_loss": crd_loss(rho, s, args.group_size, args.beta, tau=args.tau)}
    terms["loss"] = args.reward_weight * terms["crd_loss"]
    if args.anchor:
        terms["anchor_loss"] = anchor_loss(v, v_ref, n, args.anchor)
        terms["loss"] = terms["loss"] + terms["anchor_loss"]
    groups = rho.detach().view(-1, args.group_size)
    terms["rho_variance"] = groups.var(1, correction=0).mean()
    return terms


def gather(value):
    """The values that all processes have here, in their order."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


def average_gradients(parameters):
    """Over processes, so that all of them take the same optimizer step."""
    if PROCESSES == 1:
        return
    for p in parameters:
        if p.grad is None:  # of a layer whose output is not used
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / PROCESSES, gradients)  # writes into p.grad


def train_epoch(args, epoch, step, pipe, shape, uncond, layers, optimizer, source, reward):
    """The paper's Algorithm 1, once through. step: the optimizer steps of earlier epochs. source: a
    set or a file of prompts. reward: what `rewards.load` gives.

    -> R of all processes' images (PROCESSES * N,); {name: number} to log, of this process.
    """
    device = pipe.vae.device
    K = args.group_size
    N = args.groups * K // PROCESSES  # images of this process
    sigmas = schedule(pipe, args.rollout_steps, shape, device)
    # A string is hashed, so that the seeds of nearby epochs and processes are unrelated.
    seed = random.Random(f"{args.seed} {epoch} {PROCESS}").getrandbits(63)
    generator = torch.Generator(device).manual_seed(seed)
    clock = [time.perf_counter()]

    # 1. Roll out: K images of each prompt with `sampler`, without guidance. The stream is of pairs
    # (prompt, metadata), endless; "train" leaves out what is held out for evaluations.
    stream = rewards.prompts(source, "train", seed, exclude=args.eval_prompts)
    pairs = list(itertools.islice(stream, N // K))
    cond = [c.repeat_interleave(K, 0) for c in encode(pipe, [p for p, _ in pairs], args)]
    x1 = torch.randn(N, *shape, generator=generator, device=device)  # latents at sigma 1
    guidance = 1.0
    x0 = generate(
        pipe, layers, "sampler", x1, cond, uncond, args.rollout_steps, guidance, args.micro_batch
    )
    images = decode(pipe, x0)
    clock.append(time.perf_counter())

    # 2. Score. The standard deviation is over the rewards of all processes.
    prompts, metadata = zip(*[pair for pair in pairs for _ in range(K)])
    own_R, values = reward.score(images, prompts, metadata)  # values: {name: mean score}
    R = torch.cat(gather(own_R))
    s = reward_targets(R, K)[PROCESS * N : (PROCESS + 1) * N].to(device)
    n = rewards.normalize(own_R, reward.range).to(device)
    if not args.anchor_adaptive:
        n = torch.ones_like(n)
    clock.append(time.perf_counter())

    # 3. Train: each optimizer step on its share of the groups, at some of the rollout's sigmas.
    parameters = optimizer.param_groups[0]["params"]
    totals = defaultdict(float)
    images_per_step = N // args.steps_per_epoch
    for start in bar(range(0, N, images_per_step), "train"):
        # Indices of sigmas, in random order, including sigma 1, pure noise, but never sigma 0.
        order = torch.randperm(args.rollout_steps, generator=generator, device=device)
        drawn = order[: args.train_timesteps].tolist()
        micro_batches = batches(start, start + images_per_step, args.micro_batch)
        for i, rows in itertools.product(drawn, micro_batches):
            c = [part[rows] for part in cond]
            noise = torch.randn(x0[rows].shape, generator=generator, device=device)
            x = add_noise(x0[rows], noise, sigmas[i])
            u = noise - x0[rows]
            v_ref = None
            with torch.no_grad():
                with use_adapter(layers, "old"):
                    v_old = velocity(pipe, x, sigmas[i], c)
                if args.anchor:
                    with use_adapter(layers, None):
                        v_ref = velocity(pipe, x, sigmas[i], c, uncond, args.anchor_guidance)
            v = velocity(pipe, x, sigmas[i], c)  # `policy` is active
            terms = objective(v, v_old, v_ref, u, s[rows], n[rows], args)
            share = len(x) / images_per_step / len(drawn)  # of the step's mean
            (share * terms["loss"]).backward()
            for name, term in terms.items():
                totals[name] += share / args.steps_per_epoch * term.detach()
        average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        totals["grad_norm"] += norm / args.steps_per_epoch
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        # The decay starts low, as that of DiffusionNFT's EMA (arXiv 2509.16117).
        ema_update(layers, "ema", min(args.ema, (1 + step) / (10 + step)))

    # 4. Let `old` and `sampler` follow the policy.
    ema_update(layers, "old", ema_decay(step, *args.old_decay))
    ema_update(layers, "sampler", ema_decay(step, *args.sampler_decay))
    clock.append(time.perf_counter())

    numbers = torch.stack(list(totals.values())).tolist()  # in one transfer
    values |= dict(zip(totals, numbers))
    for phase, start, stop in zip(("rollout", "reward", "train"), clock, clock[1:]):
        values[f"{phase}_seconds"] = stop - start
    return R, values


# The run


def check(args):
    """Raise ValueError for settings that would fail late, or silently compute something else."""
    K = args.group_size
    if not (args.device or torch.cuda.is_available() or Path(args.model).exists()):
        raise ValueError(f"{args.model} needs a GPU: try --preset tiny, or set --device cpu")
    if args.name is None and not args.resume:
        raise ValueError("settings need a name: make them with `parse`, which applies the preset")
    if PROCESS == 0 and not args.resume and Path(f"runs/{args.name}").exists():
        raise ValueError(f"runs/{args.name} exists: --resume it, or choose another --name")
    for flag in (
        "height", "width", "rank", "groups", "rollout_steps", "train_timesteps", "steps_per_epoch",
        "eval_every", "eval_images", "eval_steps",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} has to be 1 or more")
    if args.epochs < 0:
        raise ValueError("--epochs has to be 0, to evaluate only, or more")
    if args.height % SIDE_MULTIPLE or args.width % SIDE_MULTIPLE:
        raise ValueError(f"--height and --width have to be multiples of {SIDE_MULTIPLE}")
    if K < 2 or args.micro_batch < K or args.micro_batch % K:
        raise ValueError("--group-size has to be 2 or more, --micro-batch a multiple of it")
    if args.groups % (args.steps_per_epoch * PROCESSES):
        raise ValueError("--groups has to be a multiple of --steps-per-epoch times processes")
    if args.beta <= 0 or args.tau <= 0 or args.anchor < 1e-4 and args.anchor != 0:
        raise ValueError("--beta and --tau have to be above 0, --anchor 0 or at least 1e-4")
    if len(args.old_decay) != 4 or len(args.sampler_decay) != 4:
        raise ValueError("--old-decay and --sampler-decay take four numbers")
    if args.compile and "recompile_limit" not in inspect.signature(torch.compile).parameters:
        raise ValueError(f"--compile needs a newer PyTorch than {torch.__version__}")
    rewards.check_names(args.reward, args.eval_rewards)
    if args.resume:
        saved = json.loads(Path(args.resume, "args.json").read_text())
        for flag in ("preset", "rank", "alpha", "lora"):
            if getattr(args, flag) != saved[flag]:
                raise ValueError(f"--{flag} of {args.resume} is {saved[flag]}, and stays so")
    elif args.lora and not Path(args.lora).is_dir():
        raise ValueError(f"--lora {args.lora}: there is no such folder")


def run(args, folder):
    """What surrounds the epochs: load, resume, log, evaluate, save."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if PROCESSES > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(hours=2))  # the others wait while 0 evaluates

    # Prompts, as pairs (prompt, metadata), and rewards that can score them
    source = args.prompts or rewards.default_source(args.reward)
    held_out = rewards.evaluation_prompts(source, args.eval_images, args.eval_prompts)
    if args.epochs:  # raises if the held-out prompts leave none to train on
        next(rewards.prompts(source, "train", args.seed, exclude=args.eval_prompts))
    rewards.check_prompts(args.reward, held_out + rewards.read_prompts(source))
    if args.eval_rewards:
        rewards.check_prompts(args.eval_rewards, held_out)
    reward = rewards.load(args.reward, device)
    if args.eval_rewards and PROCESS == 0:  # only process 0 evaluates
        held_out_reward = rewards.load(args.eval_rewards, device)
    if args.wandb and PROCESS == 0:
        import wandb

        wandb.init(project=args.wandb, id=folder.name, config=asdict(args), resume="allow")

    # The model, its adapters, and the optimizer of `policy`
    torch.manual_seed(args.seed)  # all processes start from the same LoRA
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
                # Each adapter, batch size and grad mode is compiled anew, by default only 8 times.
                block.compile(recompile_limit=64)
    if args.grad_checkpoint:
        pipe.transformer.enable_gradient_checkpointing(checkpoint)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-4)

    # A new run, or one that goes on where its state was last saved
    progress = {"epoch": 0, "step": 0, "images": 0, "seconds": 0.0}
    metrics = []  # the lines of metrics.jsonl
    # Lines that Weights & Biases lacks. They are sent once the state is saved: else a resumed run
    # would send them again.
    unsent = []
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        if other := state["adapters"].keys() ^ adapter_state(pipe.transformer).keys():
            raise ValueError(f"{folder} has trained another model: {sorted(other)[:3]}")
        pipe.transformer.load_state_dict(state["adapters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = args.lr
        progress = state["progress"]
        metrics = state["metrics"]
    out = folder
    if args.resume and not args.epochs:  # only evaluate: the run stays as it is
        out = folder / "evaluation"
    if PROCESS == 0:
        out.mkdir(exist_ok=True)
        (out / "args.json").write_text(json.dumps(asdict(args), indent=2))
        print(f"{out}: preset {args.preset}, reward {args.reward}, prompts {source}, {device}")

    def log(split, R, values):
        values = {"reward": R.mean().item(), **values}
        metrics.append({"split": split, **progress, **values})
        unsent.append(metrics[-1])
        (out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"epoch {progress['epoch']:3d} {split:5s}  {numbers}")

    def evaluate():
        """Draw images of held-out prompts with `ema`, always from the same noise, and score them.
        Save the LoRA, the images and the curves."""
        noise = torch.randn(len(held_out), *shape, generator=torch.Generator().manual_seed(1234))
        x0 = generate(
            pipe, layers, "ema", noise.to(device), held_out_cond, uncond, args.eval_steps,
            args.eval_guidance, args.micro_batch,
        )  # fmt: skip
        images = decode(pipe, x0)
        R, values = reward.score(images, *zip(*held_out))
        if args.eval_rewards:
            # Under names of their own: see rewards.check_names.
            values |= held_out_reward.score(images, *zip(*held_out))[1]
        log("eval", R, values)
        epoch_folder = out / f"epoch-{progress['epoch']:04d}"
        pipe.save_lora_weights(epoch_folder, transformer_lora_layers=adapter_tensors(layers, "ema"))
        rewards.contact_sheet(epoch_folder / "images.png", images, R.tolist(), held_out)
        rewards.plot_curve(out / "curve.png", metrics)

    def publish():
        while args.wandb and unsent:
            line = unsent.pop(0)
            wandb.log({f"{line['split']}/{name}": line[name] for name in line})

    if PROCESS == 0 and (progress["epoch"] == 0 or args.epochs == 0):
        evaluate()
    if args.epochs == 0:  # else the evaluation is published with the first epoch
        publish()
    epochs = range(progress["epoch"], args.epochs)
    for epoch in bar(epochs, folder.name, args.epochs, initial=epochs.start, leave=True):
        R, own_values = train_epoch(
            args, epoch, progress["step"], pipe, shape, uncond, layers, optimizer, source, reward
        )
        # A process may lack a number, such as that of a GenEval task of which it drew no prompt.
        # (A task's number is then a mean of means.)
        shards = gather(own_values)
        names = dict.fromkeys(name for values in shards for name in values)
        values = {name: fmean(v[name] for v in shards if name in v) for name in names}
        values["rho_std"] = values.pop("rho_variance") ** 0.5  # within groups
        if device.type == "cuda":
            values["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        progress["epoch"] += 1
        progress["step"] += args.steps_per_epoch
        progress["images"] += len(R)
        progress["seconds"] += sum(values[name] for name in values if name.endswith("_seconds"))
        if PROCESS > 0:
            continue
        log("train", R, values)
        if progress["epoch"] % args.eval_every == 0 or progress["epoch"] == args.epochs:
            evaluate()
        state = {"adapters": adapter_state(pipe.transformer), "optimizer": optimizer.state_dict()}
        state |= {"progress": progress, "metrics": metrics}
        torch.save(state, folder / "state.new")
        (folder / "state.new").replace(state_file)
        publish()
    if PROCESSES > 1:
        dist.barrier()
        dist.destroy_process_group()


def train(args):
    """Check the settings, make the folder, `run`. Returns the folder."""
    check(args)
    folder = Path(args.resume or f"runs/{args.name}")
    if PROCESS == 0 and not args.resume:
        folder.mkdir(parents=True)  # fails if another run has just made it
    try:
        run(args, folder)
    except BaseException:
        if PROCESS == 0 and not args.resume and not (folder / "metrics.jsonl").exists():
            shutil.rmtree(folder)  # nothing has been evaluated yet: the name is free again
        raise
    return folder


def parse(argv=None):
    """Settings from the command line: flags over a preset's defaults, or over a resumed run's."""
    parser = HfArgumentParser(Settings, description=__doc__.splitlines()[0])
    flags = parser.parse_args(argv)  # a first time, to know which defaults to set
    if flags.resume:
        defaults = json.loads(Path(flags.resume, "args.json").read_text())
        if defaults.keys() != asdict(Settings()).keys():
            raise ValueError(f"{flags.resume} holds no run of crd.py")
    else:
        names = [name for name, _, _ in rewards.parse_spec(flags.reward)]
        preset = flags.preset or ("ocr" if "ocr" in names else "geneval")
        name = f"crd-{flags.preset or '-'.join(names)}-seed{flags.seed}"
        defaults = {"preset": preset, "name": name, **PRESETS[preset]}
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)[0]


if __name__ == "__main__":
    train(parse())
