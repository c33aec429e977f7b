"""DDPO, Denoising Diffusion Policy Optimization (Black et al. 2023, arXiv 2305.13301), in one file.

Fine-tune a text-to-image model so that its images score higher under any reward, by treating its
sampler as a policy. What a reader who knows PPO would not expect:

1. An episode is the denoising of one image; an action is the result of a noisy step of the sampler.
2. An image's likelihood is intractable, but each step is a Gaussian: its log-probability is exact.
3. There is no critic. The baseline is the mean of a prompt's last 32 rewards or, until there are
   --stat-min of them, the mean of all rewards of the epoch.
4. Log-probabilities are averaged, not summed, over an image's latents. So ratios differ from 1 by
   only about 1e-4, and the clip is that small, too. (With Stable Diffusion's 16,384 latents, the
   densities themselves then differ by a factor of 1.0001^16384 = 5.) In bf16, rounding differently
   in sampling and in training could change ratios as much. So both are made to round alike:
   `first_ratio_error` in the log, |ratio - 1| before an epoch's first update, has to be 0.

    cond, i, x         state: the prompt's embeddings, the step's index from 0, the noisy latents
    x_next             action: the latents after the step, drawn from the sampler's Gaussian
    R, A               reward of the finished image; advantage, (R - mean) / std over its prompt,
                       clipped to +-5
    p                  density of a step under the policy
    p_old              the same under the policy that drew the images, at the start of the epoch
    ratio              (p / p_old)^(1 / D) for D latents, by point 4

    gradient  mean A grad log p(x_next | x, i, cond) / D     `sf`, score_function_loss
    or        mean A grad ratio                              `is`, importance_sampling_loss

The mean is over images and those of their steps that have noise. (The last steps may be without:
they are not actions then, and what the network does in them counts as part of the environment.)
At p = p_old both gradients are the same. With `--algorithm sf` there is one update, then new
images. `--algorithm is` splits an epoch's images over several updates. From the second on, the
policy is no longer the one that drew them: the ratio corrects for that (in part: a D-th root is
nearer to 1 than the true weight), and PPO's clip takes out steps whose ratio is already above
1 + clip with A > 0, or below 1 - clip with A < 0.

An epoch (train_epoch) draws images and keeps their states and log p_old (rollout), turns their
rewards into advantages (prompt_advantages), and updates the policy on every noisy step of every
image (policy_terms). What is evaluated, by the same sampler without noise, and saved for diffusers
is `ema`, a moving average of the policy. (What the paper compares with, two kinds of reward-
weighted regression, is in tiny-sd3/rwr.py.)

    python ddpo.py --preset tiny              # the bundled toy model, in minutes on any CPU
    python ddpo.py --reward compressibility   # Stable Diffusion 1.4, the paper's first task
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


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Everything a run depends on. A preset changes some defaults; flags override them all."""

    # model
    preset: Literal["sd1", "sd3", "tiny", "scenes"] = arg("sd1", "which defaults to change")
    model: str = arg("CompVis/stable-diffusion-v1-4", "folder or repo")
    dtype: Literal["bf16", "fp32"] | None = arg(None, "default: bf16 on CUDA only")
    height: int = arg(512, "in pixels")
    width: int = arg(512, "in pixels")
    max_sequence_length: int = arg(128, "T5 tokens per prompt (Stable Diffusion 3)")
    rank: int = arg(16, "LoRA rank")
    alpha: float = arg(32, "the LoRA scale is alpha / rank")
    lora: str | None = arg(None, "folder of a LoRA to start from")
    # rollout
    reward: str = arg(
        "compressibility", "name[@path-or-repo][:weight]; a sum of several, joined by commas"
    )
    prompts: str | None = arg(None, "a set such as animals, or a file; default: the reward's own")
    images: int = arg(256, "images per epoch, over all processes")
    group_size: int = arg(1, "images per prompt in an epoch")
    steps: int = arg(50, "denoising steps")
    deterministic_steps: int = arg(
        0, "how many of the last steps have no noise, and are not trained on"
    )
    guidance: float = arg(5.0, "classifier-free guidance, in training as in sampling")
    eta: float = arg(1.0, "noise of DDIM's step (Stable Diffusion 1.x)")
    noise_level: float = arg(0.7, "noise of the flow's SDE (Stable Diffusion 3)")
    micro_batch: int = arg(8, "images per pass, at most, in sampling as in training")
    # loss
    algorithm: Literal["is", "sf"] = arg("is", "importance sampling, or score function")
    updates: int = arg(4, "optimizer steps per epoch; with sf always 1")
    clip: float = arg(1e-4, "is: ratios are clipped to 1 +- this")
    stat_min: int = arg(16, "a prompt with fewer rewards uses the epoch's mean and std")
    # optimization
    epochs: int = arg(100, "in all; 0: only evaluate")
    lr: float = arg(3e-4, "AdamW learning rate; weight decay 1e-4, gradient norm at most 1")
    ema: float = arg(0.9, "decay of `ema`, at most: (1 + n) / (10 + n) after n optimizer steps")
    grad_checkpoint: bool = arg(True, "recompute blocks in the backward pass")
    compile: bool = arg(False, "torch.compile each block")
    # run
    name: str | None = arg(None, "folder runs/NAME; default: ddpo-PRESET-ALGORITHM-seedSEED")
    seed: int = arg(0, "same seed, same run, as far as the device's kernels are deterministic")
    device: str | None = arg(None, "default: cuda if there is one")
    eval_every: int = arg(10, "epochs between evaluations")
    eval_images: int = arg(128, "held-out prompts, which repeat if there are fewer; noise is fixed")
    eval_rewards: str | None = arg(None, "rewards to log that are not trained on, like --reward")
    eval_prompts: str | None = arg(None, "evaluate on this file's prompts, however many")
    resume: str | None = arg(None, "continue the run in this folder")
    wandb: str | None = arg(None, "also log to this Weights & Biases project")


PRESETS = {
    "sd1": dict(),
    # Noise that the flow's SDE adds in the last step would stay visible: that step has none. (DDIM
    # adds next to none there.) The clip is sd1's, not tuned for 65,536 latents, whose densities may
    # then differ by a factor of 700.
    "sd3": dict(
        model="stabilityai/stable-diffusion-3.5-medium",
        steps=10, deterministic_steps=1, guidance=4.5,
    ),
    # The toys, also `scenes`, have no T5. diffusers takes zeros for its tokens: one token will do.
    # An image has 2,048 latents, an eighth of the paper's: a clip of 8e-4 lets densities differ as
    # much as 1e-4 does there; it is rounded to 1e-3. Three noisy steps are enough to explore.
    "tiny": dict(
        model=TINY, device="cpu", height=32, width=64, max_sequence_length=1,
        reward=f"ocr@{TINY}", prompts="signs", images=192, group_size=8, steps=10,
        deterministic_steps=7, guidance=1.0, micro_batch=96, clip=1e-3, stat_min=8, epochs=60,
        lr=6e-4, ema=0.97, grad_checkpoint=False, eval_images=512,
        eval_rewards=f"ocr@{TINY}/judge,clipscore@{TINY}/clip,color",
    ),
}  # fmt: skip
PRESETS["scenes"] = PRESETS["tiny"] | dict(
    model=SCENES, reward=f"geneval@{SCENES}", prompts=f"{SCENES}/prompts.jsonl",
    eval_prompts=f"{SCENES}/eval.jsonl", eval_rewards=f"geneval@{SCENES}/judge",
)  # fmt: skip


# The mathematics. Latents have any shape (B, ...).

HISTORY = 32  # rewards of a prompt that are kept; the authors have 16 or 32, by task


def gaussian_step(mean, std, x_next=None, generator=None):
    """Draw x_next from N(mean, std^2), in sampling, or score the given one, in training.

    mean (B, ...), std a tensor that broadcasts to it -> x_next (B, ...) and its log_prob (B,),
    averaged, not summed, over an image's D latents, as in the authors' code: a ratio
    exp(log_prob - old_log_prob) is the ratio of the densities to the power of 1 / D. The paper's
    clip, 1e-4, is for D = 16,384.
    """
    if x_next is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        x_next = (mean + std * noise).detach()  # an action: no gradient through it
    log_prob = -(x_next - mean).square() / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    return x_next, log_prob.flatten(1).mean(1)


def ddim_step(noise_pred, x, t, t_next, alphas_cumprod, eta=1.0, x_next=None, generator=None):
    """DDIM's stochastic step from x_t to x_next and its log-probability (arXiv 2010.02502, eq. 12).

    noise_pred, x, x_next (B, ...); t, t_next () or (B,), long: timesteps, indices of alphas_cumprod
    (1000,).

    std is eq. 16's; at eta = 1, the most, this is DDPM's ancestral step. The same as diffusers'
    DDIMScheduler with prediction_type="epsilon", clip_sample=False, steps_offset=1,
    set_alpha_to_one=False. Where t_next < 0, in the last step, alpha_next is alphas_cumprod[0]: if
    it were 1, std would be 0.
    """
    shape = (-1, *[1] * (x.ndim - 1))
    # view(-1), as indexing with a tensor without dimensions makes the CPU wait for the GPU.
    alpha = alphas_cumprod[t.view(-1)].view(shape)
    alpha_next = alphas_cumprod[t_next.view(-1).clamp(min=0)].view(shape)
    x0 = (x - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
    std = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    # Clamped, as at eta = 1 it can be less than its rounding error.
    direction = (1 - alpha_next - std**2).clamp(min=0).sqrt() * noise_pred
    return gaussian_step(alpha_next.sqrt() * x0 + direction, std, x_next, generator)


def flow_sde_step(v, x, sigma, sigma_next, sigma_max, noise_level=0.7, x_next=None, generator=None):
    """A step of the SDE with the marginals of the flow's ODE (Flow-GRPO, arXiv 2505.05470, eq. 9).

    v, x, x_next (B, ...); sigma, sigma_next () or (B,); sigma_max () -> x_next and its log_prob.
    x = (1 - sigma) image + sigma noise, v = noise - image, and dt = sigma_next - sigma < 0. At
    sigma = 1 `diffusion`, noise_level sqrt(sigma / (1 - sigma)), would be infinite: sigma_max, the
    schedule's largest sigma below 1, takes sigma's place in the denominator.
    """
    shape = (-1, *[1] * (x.ndim - 1))
    sigma, sigma_next = sigma.view(shape), sigma_next.view(shape)
    dt = sigma_next - sigma
    diffusion = noise_level * (sigma / (1 - torch.minimum(sigma, sigma_max))).sqrt()
    # x + (v + correction (x + (1 - sigma) v)) dt. The predicted noise, x + (1 - sigma) v, is
    # -sigma score.
    correction = diffusion**2 / (2 * sigma)
    mean = x * (1 + correction * dt) + v * (1 + correction * (1 - sigma)) * dt
    return gaussian_step(mean, diffusion * (-dt).sqrt(), x_next, generator)


def prompt_advantages(history, prompts, R, stat_min=16, keep=HISTORY, clip=5.0):
    """Advantages (R - mean) / std by each prompt's own last `keep` rewards.

    This removes the prompt's difficulty. prompts: N str; R (N,) -> (N,), clipped to +-clip. R is
    first appended to history, {prompt: list of float}, in place. A prompt with fewer rewards than
    `stat_min` uses the mean and std of R.
    """
    R = R.double()  # where all rewards are equal, float32's rounding errors would be advantages
    for prompt, reward in zip(prompts, R.tolist()):
        history[prompt] = (history.get(prompt, []) + [reward])[-keep:]
    A = torch.empty_like(R)
    for i, prompt in enumerate(prompts):
        recent = R.new_tensor(history[prompt])
        if len(recent) < stat_min:
            recent = R
        A[i] = (R[i] - recent.mean()) / (recent.std(correction=0) + 1e-6)
    return A.clamp(-clip, clip).float()


def score_function_loss(log_prob, advantages):
    """-mean A log_prob, for the policy's own images (paper, 4.3, DDPO_SF). (B,), (B,) -> ()."""
    return -(advantages * log_prob).mean()


def importance_sampling_loss(log_prob, old_log_prob, advantages, clip=1e-4):
    """mean max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)). All (B,) -> ().

    ratio = exp(log_prob - old_log_prob), see `gaussian_step`. (Paper, sec. 4.3, DDPO_IS, clipped as
    in PPO, arXiv 1707.06347, eq. 7.)
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


# LoRA and gradient checkpointing, by hand: before an epoch's first update ratios have to be exactly
# 1, so passes with and without gradients have to round alike. (The same lines are in the other
# script, crd.py; only it uses adapter None.)

ADAPTERS = ("policy", "ema")


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


# The models. For another one, write another such class and add it to MODELS. In all of them `i`
# counts the sampler's steps from 0, and `shape` is that of an image's latents, as the pipeline of
# diffusers takes them. `step` draws x_next, or scores it if given; if not `noisy`, it draws without
# noise, and the log-probability is NaN. To compare such a class with a folder's pipeline:
# MODEL=folder python -m pytest -q -k "section and ddpo-" test_crd.py

# 8 pixels to a row of latents (the toys': 4), 2 rows to a patch of SD3's
SIDE_MULTIPLE = 16


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


class StableDiffusion:
    """Stable Diffusion 1.x: a UNet that predicts the noise, and DDIM's stochastic step."""

    prefix = "unet"  # what the network is called in the pipeline
    target_modules = ("to_q", "to_k", "to_v", "to_out.0")  # linear layers that get LoRA
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")  # for --compile

    @staticmethod
    def check(args, scheduler, unet):
        """ValueError for settings that this class does not compute, before weights are loaded."""
        expect(
            args.model, scheduler, prediction_type=["epsilon"], thresholding=[False],
            timestep_spacing=["leading", "trailing"], rescale_betas_zero_snr=[False],
        )  # fmt: skip
        expect(args.model, unet, time_cond_proj_dim=[None])  # else guidance is an input, too
        timesteps = scheduler["num_train_timesteps"]
        # If "trailing", timesteps that are closer than 2 may end at t = 0, where alpha_next = alpha
        # and std = 0.
        if args.steps > timesteps // 2:
            raise ValueError(f"--steps has to be at most half of the model's {timesteps}")

    def __init__(self, pipe, args, device):
        self.scheduler = diffusers.DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
        self.scheduler.set_timesteps(args.steps)
        self.network = pipe.unet
        scale = pipe.vae_scale_factor
        self.shape = (pipe.unet.config.in_channels, args.height // scale, args.width // scale)
        self.eta = args.eta
        self.t = self.scheduler.timesteps.to(device)
        # As DDIMScheduler defines it: not the next entry of t, if --steps does not divide 1000.
        self.t_next = self.t - self.scheduler.config.num_train_timesteps // args.steps
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)

    def encode(self, pipe, prompts):
        options = {"do_classifier_free_guidance": False}
        return [pipe.encode_prompt(prompts, pipe.vae.device, 1, **options)[0]]

    def predict(self, x, i, cond):
        x = x.to(self.network.dtype)
        return self.network(x, self.t[i], *cond, return_dict=False)[0].float()

    def step(self, prediction, x, i, x_next=None, noisy=True, generator=None):
        eta = self.eta if noisy else 0.0
        t, t_next = self.t[i], self.t_next[i]
        return ddim_step(prediction, x, t, t_next, self.alphas_cumprod, eta, x_next, generator)


class StableDiffusion3:
    """Stable Diffusion 3.x: a transformer that predicts the flow's velocity, and its SDE's step."""

    prefix = "transformer"
    target_modules = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    blocks = ("JointTransformerBlock",)

    @staticmethod
    def check(args, scheduler, transformer):
        expect(
            args.model, scheduler, _class_name=["FlowMatchEulerDiscreteScheduler"],
            use_dynamic_shifting=[False], invert_sigmas=[False], stochastic_sampling=[False],
        )  # fmt: skip

    def __init__(self, pipe, args, device):
        pipe.scheduler.set_timesteps(args.steps)
        self.network = pipe.transformer
        scale = pipe.vae_scale_factor
        channels = pipe.transformer.config.in_channels
        self.shape = (channels, args.height // scale, args.width // scale)
        self.max_sequence_length = args.max_sequence_length
        self.noise_level = args.noise_level
        self.sigmas = pipe.scheduler.sigmas.to(device)
        self.timesteps = pipe.scheduler.config.num_train_timesteps * self.sigmas

    def encode(self, pipe, prompts):
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, pipe.vae.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        return [embeds, pooled]

    def predict(self, x, i, cond):
        x = x.to(self.network.dtype)
        timestep = self.timesteps[i].expand(len(x))
        return self.network(x, *cond, timestep, return_dict=False)[0].float()

    def step(self, prediction, x, i, x_next=None, noisy=True, generator=None):
        level = self.noise_level if noisy else 0.0
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        sigma_max = self.sigmas[1]  # as sigmas[0] is 1
        return flow_sde_step(prediction, x, sigma, sigma_next, sigma_max, level, x_next, generator)


MODELS = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3}


def load_pipeline(args, device):
    """The pretrained pipeline, its text encoders still on the CPU, and its StableDiffusion or
    StableDiffusion3."""
    config = diffusers.DiffusionPipeline.load_config(args.model)
    expect(args.model, config, _class_name=list(MODELS))
    model_class = MODELS[config["_class_name"]]
    scheduler = part_class(config, "scheduler").from_pretrained(args.model, subfolder="scheduler")
    network_config = part_class(config, model_class.prefix).load_config(
        args.model, subfolder=model_class.prefix
    )
    vae_config = part_class(config, "vae").load_config(args.model, subfolder="vae")
    expect(args.model, network_config, in_channels=[vae_config["latent_channels"]])
    model_class.check(args, scheduler.config, network_config)
    precision = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parts = load_parts(args.model, config, dtype)
    pipe = getattr(diffusers, config["_class_name"]).from_pretrained(args.model, **parts)
    model = model_class(pipe, args, device)
    model.network.to(device)
    pipe.vae.to(device)
    return pipe, model


@torch.no_grad()
def encode(pipe, model, prompts):
    """N prompts -> tensors (N, ...), for `predict`. Text encoders are on the device only here."""
    encoders = [pipe.components[name] for name in pipe.components if "text_encoder" in name]
    encoders = [encoder for encoder in encoders if encoder is not None]
    for encoder in encoders:
        encoder.to(pipe.vae.device)
    cond = model.encode(pipe, prompts)
    for encoder in encoders:
        encoder.to("cpu")
    return cond


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


# The algorithm. `model` is a StableDiffusion or a StableDiffusion3, `cond` a list of tensors
# (B, ...), and `uncond` such a list for one empty prompt.


bar = partial(tqdm, leave=False, disable=PROCESS > 0)


def batches(start, stop, size):
    """Slices of at most `size` images."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def guided(model, x, i, cond, uncond, guidance):
    """f(uncond) + guidance (f(cond) - f(uncond)), where f is the prediction at step i. (Classifier-
    free guidance, arXiv 2207.12598. In rwr.py i is a tensor (B,), in this file an int.)

    Sampling and training both come through here, with the same images in a batch, so that both
    round alike and the ratios of an epoch's first update are exactly 1.
    """
    if guidance == 1.0:
        return model.predict(x, i, cond)
    both = [torch.cat([e.expand_as(c), c]) for e, c in zip(uncond, cond)]
    i = torch.cat([i, i]) if isinstance(i, torch.Tensor) else i
    f_uncond, f_cond = model.predict(torch.cat([x, x]), i, both).chunk(2)
    return f_uncond + guidance * (f_cond - f_uncond)


@torch.no_grad()
def rollout(model, noise, cond, uncond, micro_batches, noisy_steps, args, generator=None):
    """Draw images from noise x_T (N, ...), in the micro-batches that training will use.

    -> latents (N, ...); states (N, noisy_steps + 1, ...), x_T and the result of each noisy step;
    log_probs (N, noisy_steps). The steps after the first `noisy_steps` have no noise: they are
    ordinary DDIM or ODE steps. Their log-probability is NaN, and dropped.
    """
    latents = torch.empty_like(noise)
    states = noise.new_empty(len(noise), noisy_steps + 1, *noise.shape[1:])
    log_probs = noise.new_empty(len(noise), noisy_steps)
    for rows in bar(micro_batches, "sample"):
        x = noise[rows]
        states[rows, 0] = x
        c = [part[rows] for part in cond]
        for i in range(args.steps):
            prediction = guided(model, x, i, c, uncond, args.guidance)
            noisy = i < noisy_steps
            x, log_prob = model.step(prediction, x, i, noisy=noisy, generator=generator)
            if noisy:
                states[rows, i + 1] = x
                log_probs[rows, i] = log_prob
        latents[rows] = x
    return latents, states, log_probs


def policy_terms(model, x, x_next, i, old_log_prob, A, cond, uncond, args):
    """The loss of step i, from x to x_next, of B images; and what to log of their ratios."""
    prediction = guided(model, x, i, cond, uncond, args.guidance)
    _, log_prob = model.step(prediction, x, i, x_next)  # of the action that was taken
    if args.algorithm == "sf":
        loss = score_function_loss(log_prob, A)
    else:
        loss = importance_sampling_loss(log_prob, old_log_prob, A, args.clip)
    change = log_prob.detach() - old_log_prob
    ratio_error = change.expm1().abs()  # |ratio - 1|, without the rounding of float32 near 1
    terms = {"loss": loss}
    if args.algorithm == "is":
        # As the log-ratio is D `change`, for D latents, the KL in nats is D^2 times this.
        terms["approx_kl"] = change.square().mean() / 2
        # The share of ratios outside 1 +- clip. Those above it with A > 0, and those below it with
        # A < 0, get no gradient.
        terms["clip_fraction"] = (ratio_error > args.clip).float().mean()
    terms["ratio_error"] = ratio_error.mean()
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


def train_epoch(args, epoch, step, pipe, model, uncond, layers, optimizer, source, reward, history):
    """Sample, score, improve (paper, sec. 4), once through. step: the optimizer steps of earlier
    epochs. source: a set or a file of prompts. history: see `prompt_advantages`.

    -> R of all processes' images (PROCESSES * N,); {name: number} to log, of this process.
    """
    device = pipe.vae.device
    K = args.group_size
    N = args.images // PROCESSES  # images of this process
    noisy_steps = args.steps - args.deterministic_steps
    per_update = N // args.updates
    starts = range(0, N, per_update)
    # The micro-batches of each update. Images are drawn in them, too (see `guided`), so they are
    # not shuffled.
    update_batches = [batches(start, start + per_update, args.micro_batch) for start in starts]
    # A string is hashed, so that the seeds of nearby epochs and processes are unrelated.
    seed = random.Random(f"{args.seed} {epoch} {PROCESS}").getrandbits(63)
    generator = torch.Generator(device).manual_seed(seed)
    clock = [time.perf_counter()]

    # 1. Roll out. The stream is of pairs (prompt, metadata), endless; "train" leaves out what is
    # held out for evaluations.
    stream = rewards.prompts(source, "train", seed, exclude=args.eval_prompts)
    pairs = list(itertools.islice(stream, N // K))
    cond = [c.repeat_interleave(K, 0) for c in encode(pipe, model, [p for p, _ in pairs])]
    noise = torch.randn(N, *model.shape, generator=generator, device=device)
    latents, states, log_probs = rollout(
        model, noise, cond, uncond, sum(update_batches, []), noisy_steps, args, generator
    )
    images = decode(pipe, latents)
    clock.append(time.perf_counter())

    # 2. Score. The baselines are of the rewards of all processes.
    prompts, metadata = zip(*[pair for pair in pairs for _ in range(K)])
    own_R, values = reward.score(images, prompts, metadata)  # values: {name: mean score}
    R = torch.cat(gather(own_R))
    A = prompt_advantages(history, sum(gather(prompts), ()), R, args.stat_min)
    own_A = A[PROCESS * N : (PROCESS + 1) * N].to(device)
    clock.append(time.perf_counter())

    # 3. Improve: each update on its share of the images, at all of their noisy steps.
    parameters = optimizer.param_groups[0]["params"]
    totals = defaultdict(float)
    for update, micro_batches in enumerate(bar(update_batches, "train")):
        for rows, i in itertools.product(micro_batches, range(noisy_steps)):
            c = [part[rows] for part in cond]
            x, x_next = states[rows, i], states[rows, i + 1]
            terms = policy_terms(
                model, x, x_next, i, log_probs[rows, i], own_A[rows], c, uncond, args
            )
            share = len(x) / per_update / noisy_steps  # of the update's mean
            (share * terms["loss"]).backward()
            for name, term in terms.items():
                totals[name] += share / args.updates * term.detach()
            if update == 0:
                totals["first_ratio_error"] += share * terms["ratio_error"]
        average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        totals["grad_norm"] += norm / args.updates
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        # The decay starts low, as that of DiffusionNFT's EMA (arXiv 2509.16117).
        ema_update(layers, "ema", min(args.ema, (1 + step) / (10 + step)))
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
        "height", "width", "rank", "images", "group_size", "steps", "micro_batch", "updates",
        "eval_every", "eval_images",
    ):  # fmt: skip
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} has to be 1 or more")
    if args.epochs < 0:
        raise ValueError("--epochs has to be 0, to evaluate only, or more")
    if args.height % SIDE_MULTIPLE or args.width % SIDE_MULTIPLE:
        raise ValueError(f"--height and --width have to be multiples of {SIDE_MULTIPLE}")
    if args.images % (args.updates * PROCESSES) or args.images % (K * PROCESSES):
        raise ValueError("--images: a multiple of --updates and --group-size, each times processes")
    if args.algorithm == "sf" and args.updates != 1:
        raise ValueError("--algorithm sf: one update per epoch")
    if not 0 <= args.deterministic_steps < args.steps:
        raise ValueError("--deterministic-steps leaves no step to train on")
    # One reward has no standard deviation; a whole group has to fit into its prompt's history.
    if not 2 <= args.stat_min <= HISTORY or K > HISTORY:
        raise ValueError(
            f"{HISTORY} rewards are kept of a prompt: --stat-min is 2 to {HISTORY}, --group-size "
            f"at most {HISTORY}"
        )
    if not 0 < args.eta <= 1 or args.noise_level <= 0:
        raise ValueError("--eta is above 0, at most 1, --noise-level above 0: steps need noise")
    if args.compile and "recompile_limit" not in inspect.signature(torch.compile).parameters:
        raise ValueError(f"--compile needs a newer PyTorch than {torch.__version__}")
    rewards.check_names(args.reward, args.eval_rewards)
    if args.resume:
        saved = json.loads(Path(args.resume, "args.json").read_text())
        for flag in ("preset", "rank", "alpha", "lora"):
            if getattr(args, flag) != saved[flag]:
                raise ValueError(f"--{flag} of {args.resume} is {saved[flag]}, and stays so")
        parts = [(name, weight) for name, _, weight in rewards.parse_spec(args.reward)]
        saved_parts = [(name, weight) for name, _, weight in rewards.parse_spec(saved["reward"])]
        if args.epochs and parts != saved_parts:
            raise ValueError(f"--reward of {args.resume} stays: its past rewards are the baseline")
    elif args.lora and not Path(args.lora).is_dir():
        raise ValueError(f"--lora {args.lora}: there is no such folder")


def run(args, folder, train_epoch):
    """What surrounds the epochs: load, resume, log, evaluate, save. train_epoch: the one above, or
    rwr.py's."""
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
    pipe, model = load_pipeline(args, device)
    uncond = encode(pipe, model, [""])
    held_out_cond = encode(pipe, model, [prompt for prompt, _ in held_out])
    layers = add_lora(model.network, model.target_modules, args.rank, args.alpha, ADAPTERS)
    state_file = folder / "state.pt"
    if args.lora and not state_file.exists():
        load_lora(layers, pipe, args.lora, model.prefix)
    if args.compile:
        for block in model.network.modules():
            if type(block).__name__ in model.blocks:
                # Each adapter, batch size and grad mode is compiled anew, by default only 8 times.
                block.compile(recompile_limit=64)
    if args.grad_checkpoint:
        model.network.enable_gradient_checkpointing(checkpoint)
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-4)

    # A new run, or one that goes on where its state was last saved
    progress = {"epoch": 0, "step": 0, "images": 0, "seconds": 0.0}
    metrics = []  # the lines of metrics.jsonl
    # Lines that Weights & Biases lacks. They are sent once the state is saved: else a resumed run
    # would send them again.
    unsent = []
    history = {}  # prompt: its last rewards
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        if other := state["adapters"].keys() ^ adapter_state(model.network).keys():
            raise ValueError(f"{folder} has trained another model: {sorted(other)[:3]}")
        model.network.load_state_dict(state["adapters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = args.lr
        progress = state["progress"]
        metrics = state["metrics"]
        history = state["history"]
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
        """Draw images of held-out prompts with `ema`, from the same x_T each time and without other
        noise, and score them. Save the LoRA, the images and the curves."""
        noise = torch.randn(
            len(held_out), *model.shape, generator=torch.Generator().manual_seed(1234)
        )
        micro_batches = batches(0, len(held_out), args.micro_batch)
        with use_adapter(layers, "ema"):
            noisy_steps = 0
            latents, _, _ = rollout(
                model, noise.to(device), held_out_cond, uncond, micro_batches, noisy_steps, args
            )
        images = decode(pipe, latents)
        R, values = reward.score(images, *zip(*held_out))
        if args.eval_rewards:
            # Under names of their own: see rewards.check_names.
            values |= held_out_reward.score(images, *zip(*held_out))[1]
        log("eval", R, values)
        epoch_folder = out / f"epoch-{progress['epoch']:04d}"
        tensors = adapter_tensors(layers, "ema")
        pipe.save_lora_weights(epoch_folder, **{f"{model.prefix}_lora_layers": tensors})
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
            args, epoch, progress["step"], pipe, model, uncond, layers, optimizer, source, reward,
            history,
        )  # fmt: skip
        # A process may lack a number, such as that of a GenEval task of which it drew no prompt.
        # (A task's number is then a mean of means.)
        shards = gather(own_values)
        names = dict.fromkeys(name for values in shards for name in values)
        values = {name: fmean(v[name] for v in shards if name in v) for name in names}
        if device.type == "cuda":
            values["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        progress["epoch"] += 1
        progress["step"] += args.updates
        progress["images"] += len(R)
        progress["seconds"] += sum(values[name] for name in values if name.endswith("_seconds"))
        if PROCESS > 0:
            continue
        log("train", R, values)
        if progress["epoch"] % args.eval_every == 0 or progress["epoch"] == args.epochs:
            evaluate()
        state = {"adapters": adapter_state(model.network), "optimizer": optimizer.state_dict()}
        state |= {"progress": progress, "metrics": metrics, "history": history}
        torch.save(state, folder / "state.new")
        (folder / "state.new").replace(state_file)
        publish()
    if PROCESSES > 1:
        dist.barrier()
        dist.destroy_process_group()


def train(args, train_epoch=train_epoch):
    """Check the settings, make the folder, `run`. Returns the folder."""
    check(args)
    folder = Path(args.resume or f"runs/{args.name}")
    if PROCESS == 0 and not args.resume:
        folder.mkdir(parents=True)  # fails if another run has just made it
    try:
        run(args, folder, train_epoch)
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
            raise ValueError(f"{flags.resume} holds no run of ddpo.py")
    else:
        name = f"ddpo-{flags.preset}-{flags.algorithm}-seed{flags.seed}"
        defaults = {"name": name, **PRESETS[flags.preset]}
        if flags.algorithm == "sf":
            defaults["updates"] = 1
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)[0]


if __name__ == "__main__":
    train(parse())
