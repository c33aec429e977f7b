"""CRD, Centered Reward Distillation (Zhu, Wang, Lathuiliere, Kalogeiton 2026, arXiv 2603.14128), in one file.

Fine-tune a flow-matching text-to-image model so that its images score higher under a reward r(x, c). The
problem max_p E_p[r] - beta KL(p || p_old) has a solution p* in closed form, from which the reward follows:

    p*(x|c) = p_old(x|c) exp(r(x,c) / beta) / Z(c)    so    r(x,c) = beta log (p*/p_old)(x|c) + beta log Z(c)

Z(c) is intractable, but the same for every image of a prompt: draw K images of each, subtract their mean
from both sides, and Z is gone. Replace p* by the model p, and it remains to fit its log-ratio rho to the
scaled reward s, both centered: no policy gradient, no backpropagation through the sampler.

    rho_i = mean[(v_old - u)^2 / m_old - (v - u)^2 / m]    ~ log (p/p_old), m = mean |v - u| (implicit_reward)
    L_crd = A_max/beta mean_i[(beta (rho_i - mean_K rho) - (s_i - mean_K s))^2]                     (crd_loss)
    L     = L_crd + mean_i[kappa_i mean (v - v_ref)^2]     with an anchor                        (anchor_loss)

A noised image has the velocity u = noise - x0; v, v_old, v_ref are the predictions of the policy, of p_old
and of the anchor: the pretrained model with guidance, so guidance is distilled too. Advantages are clipped
to +-A_max, mean_K is over a prompt's images, and kappa_i is the anchor's weight. Copies of one LoRA share
the frozen model: `policy` learns; `sampler` draws the images, nearly the policy's own; `old` is p_old and
follows the policy more slowly, or rho would be 0 and restrain nothing; `ema`, an average of the policy, is
evaluated and saved. The loop, in `train`:

    for each epoch:
        roll out: draw K images of each prompt with `sampler`                                     (sample_ode)
        score them, and turn rewards into targets s                                           (reward_targets)
        for each optimizer step, on its share of the prompts:
            at each training sigma, noise the images and add up the gradients of L      (accumulate_gradients)
        let `old` and `sampler` follow the policy                                      (ema_decay, ema_update)

    python crd.py --preset tiny        # the bundled toy model, on any CPU, in minutes
    python crd.py --reward ocr         # Stable Diffusion 3.5 Medium learns to spell, on one GPU

Under torchrun, several GPUs share the groups of each step. Left out, to keep it readable: other models than
Stable Diffusion 3.x (for another flow model, replace `load_pipeline`, `encode`, `velocity` and `decode`).
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import rewards

TINY = Path(__file__).resolve().parent / "tiny-sd3"


@dataclass
class Settings:
    """All that a run depends on. The command line is made from it; a preset is a set of other defaults."""

    # model
    preset: Annotated[Literal["ocr", "geneval", "tiny", None], "by default the reward's, or geneval"] = None
    model: Annotated[str, "a Stable Diffusion 3 folder or repo"] = "stabilityai/stable-diffusion-3.5-medium"
    dtype: Annotated[Literal["auto", "bf16", "fp32"], "of frozen weights; auto: the faster"] = "auto"
    height: Annotated[int, "image height in pixels"] = 512
    width: Annotated[int, "image width in pixels"] = 512
    max_sequence_length: Annotated[int, "T5 tokens per prompt"] = 128
    rank: Annotated[int, "LoRA rank"] = 32
    alpha: Annotated[float, "LoRA scale is alpha / rank"] = 64
    lora: Annotated[str | None, "start from the LoRA in this folder, such as runs/NAME/best"] = None
    # rollout
    reward: Annotated[str, "name[@path-or-repo][:weight], joined by commas (see rewards.py)"] = "ocr"
    reward_batch: Annotated[int, "images that a reward model is shown at once"] = 16
    prompts: Annotated[str | None, "prompt set, or .txt or .jsonl file; by default the reward's own"] = None
    groups: Annotated[int, "prompts per epoch"] = 48
    group_size: Annotated[int, "images per prompt (K)"] = 24
    rollout_steps: Annotated[int, "sampler steps of a rollout"] = 10
    sample_batch: Annotated[int, "images sampled at once"] = 24
    decode_batch: Annotated[int, "images decoded at once"] = 8
    tie_sampler: Annotated[bool, "ablation: draw the images with `old` itself"] = False
    # loss
    beta: Annotated[float, "scale of the implicit reward beta * rho"] = 1.0
    tau: Annotated[float, "temperature of group means weighted by the targets (inf: plain)"] = math.inf
    advantage_clip: Annotated[float, "advantages are clipped to plus and minus this (A_max)"] = 5.0
    reward_weight: Annotated[float, "weight of the centered loss (0: the anchor alone)"] = 1.0
    anchor: Annotated[float, "kappa, the anchor's largest weight (0: no anchor)"] = 0.1
    anchor_guidance: Annotated[float, "guidance of the pretrained model that anchors (1: none)"] = 4.5
    anchor_adapt: Annotated[Literal["reward", "advantage", "off"], "what raises an image's kappa"] = "reward"
    train_timesteps: Annotated[int | None, "sigmas per step, drawn from the rollout's; by default all"] = None
    # optimisation
    epochs: Annotated[int, "epochs in all (0: only evaluate)"] = 300
    steps_per_epoch: Annotated[int, "optimizer steps per epoch, each on a share of the groups"] = 1
    micro_batch: Annotated[int, "images in a forward and backward pass (a group may be cut)"] = 24
    lr: Annotated[float, "AdamW learning rate"] = 3e-4
    weight_decay: Annotated[float, "AdamW weight decay"] = 1e-4
    old_decay: Annotated[tuple, "ema_decay of `old`: start step, value, slope, end"] = (0, 0.25, 0.001, 0.5)
    sampler_decay: Annotated[tuple, "the same for `sampler`"] = (0, 0.0, 0.001, 0.5)
    ema: Annotated[float, "decay per step of the average that is evaluated and saved"] = 0.9
    grad_checkpoint: Annotated[bool, "recompute blocks in the backward pass, to save memory"] = True
    compile: Annotated[bool, "torch.compile each transformer block"] = False
    # run
    name: Annotated[str | None, "the run's folder is runs/NAME; by default preset, reward and seed"] = None
    seed: Annotated[int, "fixes the whole run on one device"] = 0
    device: Annotated[str | None, "cuda, cpu ...; by default cuda where there is one"] = None
    eval_every: Annotated[int, "epochs between evaluations"] = 10
    eval_images: Annotated[int, "images of held-out prompts, from the same noise every time"] = 128
    eval_steps: Annotated[int, "sampler steps of an evaluation"] = 40
    eval_order: Annotated[int, "solver of evaluations: 2 is DPM-Solver++(2M), 1 Euler"] = 2
    eval_guidance: Annotated[float, "guidance of evaluations (rollouts have none)"] = 1.0
    eval_rewards: Annotated[str | None, "more rewards, as for --reward, for evaluations only"] = None
    eval_prompts: Annotated[str | None, "evaluate on all prompts of this .txt or .jsonl file"] = None
    resume: Annotated[str | None, "resume the run in this folder, with its settings"] = None
    checkpoint: Annotated[Literal["last", "best"], "what --resume starts from"] = "last"
    wandb: Annotated[str | None, "also log to this Weights & Biases project"] = None


PRESETS = {
    "ocr": dict(reward="ocr", steps_per_epoch=2, train_timesteps=9, old_decay=(0, 0.25, 0.005, 0.999),
                sampler_decay=(75, 0.0, 0.0075, 0.999)),
    "geneval": dict(reward="geneval", train_timesteps=9),
    "tiny": dict(model=str(TINY), reward=f"ocr@{TINY}", prompts="signs", height=32, width=64, device="cpu",
                 max_sequence_length=1, rank=16, alpha=32, groups=48, group_size=8, rollout_steps=6,
                 sample_batch=192, decode_batch=96, micro_batch=64, train_timesteps=2, steps_per_epoch=6,
                 lr=1.5e-3, ema=0.97, old_decay=(0, 0.25, 0.01, 0.9), anchor_guidance=4.0,
                 grad_checkpoint=False, epochs=48, eval_every=16, eval_steps=10, eval_images=512,
                 eval_rewards=f"ocr@{TINY}/judge,clipscore@{TINY}/clip,color"),
}


# The mathematics: pure functions, in the order in which the loop calls them

def sample_ode(velocity, noise, sigmas, order=2):
    """Integrate dx/dsigma = v from noise to an image by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095).

    In flow form alpha = 1 - sigma and lambda = log(alpha / sigma); a step from s to t is
    x_t = D + (t / s) (x_s - D). At first order, Euler's method, D is the data prediction x0 = x - sigma v; at
    second it is extrapolated in lambda from the last two. First order is kept where that would overshoot: in
    the first step, in the last, and in any more than twice as long in lambda as the one before.

    velocity(x, sigma ()) -> (B, C, H, W); noise (B, C, H, W); sigmas (S + 1,), descending, the last one 0.
    Returns x0 (B, C, H, W). ValueError for other sigmas.
    """
    if sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must descend to 0, not {sigmas.tolist()}")
    x, before, log_snr = noise, None, torch.log((1 - sigmas) / sigmas)
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        D = x0 = x - s * velocity(x, s)
        if order == 2 and i > 0:
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            if ratio <= 2:  # 0 after sigma = 1, infinite before 0
                D = x0 + ratio / 2 * (x0 - before)
        x = D + t / s * (x - D)
        before = x0
    return x


def reward_targets(rewards, group_size, clip=5.0):
    """Targets s = A / (2 clip) + 1/2 in [0, 1], A = (R - mean_group R) / (std_all R + 1e-4) within +-clip.

    rewards R (N,), a prompt's images side by side. The standard deviation is of all N, so that a prompt with
    little spread is not amplified. The 1/2 cancels in the loss. ValueError if groups are not whole.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of {group_size}")
    centered = rewards.view(-1, group_size) - rewards.view(-1, group_size).mean(1, keepdim=True)
    A = centered.flatten() / (rewards.std(correction=0) + 1e-4)
    return A.clamp(-clip, clip) / (2 * clip) + 0.5


def add_noise(x0, noise, sigma):
    """x_sigma = (1 - sigma) x0 + sigma noise, the straight path of flow matching (Lipman et al. 2022).

    x0, noise (B, C, H, W); sigma () or (B,) in [0, 1]. Its velocity, the training target, is u = noise - x0.
    """
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


def implicit_reward(v, v_old, u, adaptive=True):
    """rho = mean[(v_old - u)^2 / m_old - (v - u)^2 / m], a one-sample proxy of log p(x|c) - log p_old(x|c).

    (Paper, sec. 3.) The ELBO bounds a model's log-likelihood by minus its denoising error; both models are
    shown the same sigma and noise. The adaptive weights m = mean |v - u|, at least 1e-5 and detached, put all
    sigmas on one scale. They are DiffusionNFT's idea (arXiv 2509.16117), there for x0 = x - sigma v, so that
    its rho is sigma times ours; the CRD authors' public code has them for velocities, as here.
    v, v_old, u (B, C, H, W) -> (B,). Zero where v = v_old.
    """
    def error(prediction):
        difference = prediction - u
        m = difference.abs().mean((1, 2, 3)).detach().clamp(min=1e-5) if adaptive else 1.0
        return difference.square().mean((1, 2, 3)) / m

    return error(v_old) - error(v)


def group_mean(x, targets, group_size, tau=math.inf):
    """The mean of x over each group, repeated for its members: (1, B), or (2, B) at a finite temperature.

    At finite tau it is weighted twice, by softmax(s / tau) and softmax(-s / tau): a group is centered once on
    its best images and once on its worst. x and targets s (B,), whole groups side by side.
    """
    s = targets.view(-1, group_size)
    logits = torch.zeros_like(s)[None] if tau == math.inf else torch.stack([s, -s]) / tau
    mean = (logits.softmax(-1) * x.view(-1, group_size)).sum(-1, keepdim=True)
    return mean.expand(-1, -1, group_size).flatten(1)


def crd_loss(rho, rho_mean, targets, targets_mean, beta=1.0, clip=5.0):
    """A_max/beta mean_i[(beta (rho_i - mean rho) - (s_i - mean s))^2], the centered loss; `clip` is A_max.

    rho, targets s (B,); rho_mean, targets_mean (1, B) or (2, B), detached, by `group_mean`: of the whole
    group even where the B images are a part of one. Two centerings are averaged. With the plain mean,
    detaching it changes no gradient: the residuals sum to zero in each group.

    Why A_max/beta: at rho = 0 the gradient is then -mean_i[A_i grad rho_i] where nothing is clipped, whatever
    A_max and beta are. They set the optimum, rho - mean rho = (R - mean R) / (2 A_max beta std).
    """
    return clip / beta * (beta * (rho - rho_mean) - (targets - targets_mean)).square().mean()


def anchor_loss(v, v_ref, normalized_reward, kappa, kappa_min=1e-4):
    """mean_i[kappa_i mean (v - v_ref)^2], with kappa_i = kappa_min + n_i (kappa - kappa_min).

    The KL to the guided pretrained model, up to a weight per sigma. v, v_ref (B, C, H, W); n (B,) in [0, 1],
    the normalized_reward; None: kappa everywhere. Images of low reward have everything to learn, so the
    anchor is weak there; it is strong on those that could start to exploit the reward.
    """
    kappa_min = min(kappa_min, kappa)
    strength = kappa if normalized_reward is None else kappa_min + normalized_reward * (kappa - kappa_min)
    return (strength * (v - v_ref).square().mean((1, 2, 3))).mean()


def ema_decay(step, start_step, start_value, slope, end_value):
    """The share of itself that an adapter keeps as it follows the policy, after optimizer step `step`."""
    return start_value if step < start_step else min(start_value + slope * (step - start_step), end_value)


# The algorithm

def accumulate_gradients(transformer, layers, x0, noise, sigma, cond, uncond, targets, normalized_reward,
                         weight, args):
    """Add `weight` times the gradient of the objective L at one sigma to the policy's gradients.

    x0, noise (B, C, h, w), targets and normalized_reward (B,): whole groups side by side; cond of their B / K
    prompts. A micro-batch is some groups or a piece of one; where groups are cut, rho's mean over the whole
    group comes from a pass without gradients. Returns `weight` times (L, L_crd, anchor, rho, its variance).
    """
    K, B, totals = args.group_size, len(x0), torch.zeros(5)
    x, u = add_noise(x0, noise, sigma), noise - x0
    targets_mean = group_mean(targets, targets, K, args.tau)

    def predict(rows, adapter, guidance=1.0, grad=False):
        with use_adapter(layers, adapter), torch.set_grad_enabled(grad):
            return velocity(transformer, x[rows], sigma, [t[rows // K] for t in cond], uncond, guidance)

    # A chunk is as many whole groups as fit in a micro-batch, or one group that is cut into pieces.
    for chunk in torch.arange(B).split(max(args.micro_batch // K, 1) * K):
        pieces = chunk.split(args.micro_batch)
        if args.reward_weight:
            v_old = torch.cat([predict(rows, "old") for rows in pieces])
            if len(pieces) > 1:
                whole = torch.cat([predict(rows, "policy") for rows in pieces])
                rho_mean = group_mean(implicit_reward(whole, v_old, u[chunk]), targets[chunk], K, args.tau)
        for rows in pieces:
            v = predict(rows, "policy", grad=True)
            reward_loss = anchor = rho = variance = torch.zeros((), device=v.device)
            if args.reward_weight:
                here = rows - chunk[0]
                rho = implicit_reward(v, v_old[here], u[rows])
                if len(pieces) == 1:
                    rho_mean = group_mean(rho.detach(), targets[rows], K, args.tau)
                reward_loss = crd_loss(rho, rho_mean[:, here], targets[rows], targets_mean[:, rows],
                                       args.beta, args.advantage_clip)
                variance = (rho - rho_mean[0, here]).square()
            if args.anchor:
                v_ref = predict(rows, None, args.anchor_guidance)
                anchor = anchor_loss(v, v_ref, normalized_reward[rows], args.anchor)
            loss, share = args.reward_weight * reward_loss + anchor, weight * len(rows) / B
            (share * loss).backward()
            values = torch.stack([loss, reward_loss, anchor, rho.mean(), variance.mean()])
            totals += share * values.detach().cpu()
    return totals


def train(args):
    """The paper's Algorithm 1, from loading to the last evaluation. Returns the run's folder."""
    folder, device = rewards.open_run(args)
    process, world_size = rewards.processes()
    if args.groups % (args.steps_per_epoch * world_size):
        raise ValueError(f"--groups must be a multiple of --steps-per-epoch x processes (here {world_size})")
    reward, judge, stream, held_out, held_out_metadata = rewards.load_task(args, device)
    pipe = load_pipeline(args, device)
    transformer, scale = pipe.transformer, pipe.vae_scale_factor
    shape = transformer.config.in_channels, args.height // scale, args.width // scale  # of an image's latents

    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)  # not for LoRA, prompts, evaluations
    held_out_cond, uncond = encode(pipe, held_out, args), encode(pipe, [""], args)
    layers = add_lora(transformer, TARGET_MODULES, args.rank, args.alpha, ADAPTERS)
    if args.lora:
        for adapter in ADAPTERS:
            load_lora(Path(args.lora, "pytorch_lora_weights.safetensors"), layers, adapter)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each kind of block, in each of its uses
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward)
    if args.grad_checkpoint:
        checkpoint_blocks(transformer.transformer_blocks, layers)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), 1e-8, args.weight_decay)
    progress = {"epoch": 0, "step": 0, "prompts": 0, "images": 0, "seconds": 0.0, "best": -math.inf,
                "best_by": [args.reward, args.prompts, args.eval_prompts, args.eval_images, args.eval_steps,
                            args.eval_guidance, args.eval_order]}
    if args.resume:
        restore(folder / args.checkpoint, layers, optimizer, generator, progress, args)
        stream = itertools.islice(stream, progress["prompts"], None)
    if args.epochs or not args.resume:
        rewards.write_aside(folder / "args.json", json.dumps(asdict(args), indent=2))

    def evaluate():
        """Draw the held-out prompts with `ema`, always from the same noise; score, log and show them."""
        if process:
            return
        noise = torch.randn(len(held_out), *shape, generator=torch.Generator().manual_seed(1234)).to(device)
        with use_adapter(layers, "ema"):
            latents = generate(pipe, noise, args.eval_steps, held_out_cond, args.sample_batch, uncond,
                               args.eval_guidance, args.eval_order, "evaluate")
        images = decode(pipe, latents, args.decode_batch)
        mean = rewards.evaluate(folder, args, progress, reward, judge, images, held_out, held_out_metadata)
        if args.epochs and mean > progress["best"]:
            progress["best"] = mean
            save(folder / "best", layers, optimizer, generator, progress)

    K, N, T = args.group_size, args.groups * args.group_size, args.train_timesteps or args.rollout_steps
    # Under torchrun, each process draws the random numbers of all, and keeps those of its own groups.
    mine = torch.arange(N).view(-1, world_size, K)[:, process].flatten()
    if not (args.resume and args.epochs):  # a resumed run has done it
        evaluate()
    pipe.scheduler.set_timesteps(args.rollout_steps)
    sigmas, start = pipe.scheduler.sigmas.to(device), progress["epoch"]
    if args.epochs:
        save(folder / "last", layers, optimizer, generator, progress)
    for epoch in tqdm(range(start, args.epochs), desc=folder.name, initial=start, total=args.epochs):
        clock = [time.perf_counter()]

        # 1. Roll out: K images of each prompt with the sampler, without guidance.
        drawn = list(itertools.islice(stream, args.groups))[process::world_size]
        cond = encode(pipe, [prompt for prompt, _ in drawn], args)
        noise = torch.randn(N, *shape, generator=generator, device=device)[mine]
        with use_adapter(layers, "old" if args.tie_sampler else "sampler"):
            x0 = generate(pipe, noise, args.rollout_steps, cond, args.sample_batch)  # of mine, (n, C, h, w)
        images = decode(pipe, x0, args.decode_batch)
        clock.append(time.perf_counter())

        # 2. Score.
        prompts, metadata = zip(*[pair for pair in drawn for _ in range(K)])
        R, parts = rewards.gather_scores(reward.score(images, prompts, metadata), mine)  # (N,)
        targets = reward_targets(R, K, args.advantage_clip)[mine].to(device)
        normalized_reward = {"reward": rewards.normalize(R, reward.range)[mine].to(device),
                             "advantage": targets, "off": torch.ones_like(targets)}[args.anchor_adapt]
        clock.append(time.perf_counter())

        # 3. Train: each optimizer step on its share of the groups, at T of the rollout's sigmas.
        totals = torch.zeros(6)  # loss, its two terms, rho, its variance in a group, the gradient's norm
        shares = torch.arange(len(mine)).split(len(mine) // args.steps_per_epoch)
        for rows in tqdm(shares, desc="train", leave=False):
            share_cond = [t[rows[::K] // K] for t in cond]
            for i in torch.randperm(args.rollout_steps, generator=generator, device=device)[:T]:
                noise = torch.randn(N // args.steps_per_epoch, *shape, generator=generator, device=device)
                totals[:5] += accumulate_gradients(
                    transformer, layers, x0[rows], noise[mine[:len(rows)]], sigmas[i], share_cond, uncond,
                    targets[rows], normalized_reward[rows], 1 / T, args)
            rewards.average_over_processes([p.grad for p in parameters])
            totals[5] += nn.utils.clip_grad_norm_(parameters, 1.0).cpu()
            if not totals.isfinite().all():
                raise FloatingPointError(f"the loss is {totals[0]:g}, its gradient's norm {totals[5]:g}: "
                                         "stopped before the optimizer step, try a smaller --lr")
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] += 1
            ema_update(layers, "ema", min(args.ema, (1 + progress["step"]) / (10 + progress["step"])))

        rewards.average_over_processes([totals[:5]])

        # 4. Let `old` and the sampler follow the policy.
        ema_update(layers, "old", ema_decay(progress["step"], *args.old_decay))
        ema_update(layers, "sampler", ema_decay(progress["step"], *args.sampler_decay))
        clock.append(time.perf_counter())

        seconds = [end - begin for begin, end in itertools.pairwise(clock)]
        for key, more in {"epoch": 1, "prompts": args.groups, "images": N, "seconds": sum(seconds)}.items():
            progress[key] += more
        loss, centered_loss, anchor, rho, variance, grad_norm = (totals / args.steps_per_epoch).tolist()
        values = dict(loss=loss, centered_loss=centered_loss, anchor=anchor, grad_norm=grad_norm, rho=rho)
        values["rho_std"] = variance**0.5  # within a group
        rewards.log_epoch(folder, args, progress, R, parts, values, seconds, device)
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            evaluate()
        save(folder / "last", layers, optimizer, generator, progress)
    return folder


# LoRA and gradient checkpointing, by hand

ADAPTERS = ("policy", "ema", "old", "sampler")
TARGET_MODULES = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
                  "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


class LoRALinear(nn.Module):
    """A frozen linear layer plus one of several low-rank updates: y = W x + (alpha / rank) B A x.

    (Hu et al. 2021, arXiv 2106.09685.) `active` names the update in use; None is the pretrained layer, to the
    bit. A is Gaussian and B zero, so updates start as nothing; the first is trainable. Stored in float32.
    """

    def __init__(self, base, rank, alpha, adapters):
        super().__init__()
        self.base, self.scale, self.active = base.requires_grad_(False), alpha / rank, adapters[0]
        A = torch.randn(rank, base.in_features, device=base.weight.device) / rank
        B = torch.zeros(base.out_features, rank, device=base.weight.device)
        self.A = nn.ParameterDict({name: nn.Parameter(A.clone(), name == adapters[0]) for name in adapters})
        self.B = nn.ParameterDict({name: nn.Parameter(B.clone(), name == adapters[0]) for name in adapters})

    def forward(self, x):
        if self.active is None:
            return self.base(x)
        A, B = self.A[self.active].to(x.dtype), self.B[self.active].to(x.dtype)
        flat = x.flatten(0, -2)  # else matmul may take another kernel where gradients are recorded
        return (self.base(flat) + flat @ A.T @ (self.scale * B).T).view(*x.shape[:-1], -1)


def add_lora(model, target_modules, rank, alpha, adapters=("policy",)):
    """Freeze `model` and put a LoRALinear in place of each linear layer whose name ends in a target.

    Returns {layer name: LoRALinear}; ValueError if nothing matches. (`attn2.to_q`, SD3.5's second attention,
    does not end in `attn.to_q`.)
    """
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(f".{end}" for end in target_modules)):
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(module, rank, alpha, adapters)
            setattr(model.get_submodule(parent), child, layers[name])
    if not layers:
        raise ValueError(f"no linear layer of {type(model).__name__} is named {' or '.join(target_modules)}")
    return layers


@contextlib.contextmanager
def use_adapter(layers, name):
    """Inside, every layer computes with adapter `name`, or as pretrained where it is None."""
    before = next(iter(layers.values())).active
    try:
        for layer in layers.values():
            layer.active = name
        yield
    finally:
        for layer in layers.values():
            layer.active = before


@torch.no_grad()
def ema_update(layers, name, decay):
    """Let adapter `name` follow the policy: decay * itself + (1 - decay) * policy, A and B each."""
    for layer in layers.values():
        for weights in (layer.A, layer.B):
            weights[name].lerp_(weights["policy"], 1 - decay)


def save_lora(path, layers, adapter="policy", prefix="transformer"):
    """Write an adapter as diffusers' `load_lora_weights` takes it, the scale alpha / rank folded into B."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = layer.A[adapter].detach().cpu()
        tensors[f"{prefix}.{name}.lora_B.weight"] = layer.scale * layer.B[adapter].detach().cpu()
    rewards.write_aside(path, lambda aside: save_file(tensors, aside))


def load_lora(path, layers, adapter="policy", prefix="transformer"):
    """Read a file of `save_lora`, or of diffusers, into an adapter. ValueError if it does not fit.

    As in diffusers, alpha is the rank unless the file's metadata says otherwise.
    """
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    alpha, r, *unlike = (config.get(f"{prefix}.{key}") for key in (
        "lora_alpha", "r", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"))
    own = {f"{prefix}.{name}.lora_{part}.weight": getattr(layer, part)[adapter]
           for name, layer in layers.items() for part in "AB"}
    shapes, found = ({key: tensor.shape for key, tensor in side.items()} for side in (own, tensors))
    if shapes != found or any(unlike):
        raise ValueError(f"{path} is no plain LoRA of these layers and this rank: see --model and --rank")
    scale = (alpha / r if alpha else 1) / next(iter(layers.values())).scale
    with torch.no_grad():
        for key, weights in own.items():
            weights.copy_(tensors[key] * (scale if ".lora_B." in key else 1))


class Checkpoint(torch.autograd.Function):
    """Run a block and keep only its inputs; run it again when its gradient is asked for.

    (Chen et al. 2016, arXiv 1604.06174.) Memory for activations falls from all blocks to one, for one extra
    forward. `tensors` are the block's `count` inputs, then its trainable parameters: autograd sees both.
    """

    @staticmethod
    def forward(ctx, run, count, *tensors):
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        return run(*tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors[:ctx.count]]
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs, grads = zip(*[(y, g) for y, g in zip(outputs, grads) if y is not None and y.requires_grad])
        sources = [*inputs, *ctx.saved_tensors[ctx.count:]]
        wanted = [t for t in sources if t.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, None, *[next(found) if t.requires_grad else None for t in sources]


def checkpoint_blocks(blocks, layers):
    """Checkpoint these modules, whatever their arguments. The second run of each uses the first's adapter."""
    for block in blocks:
        def forward(*args, block=block, run=block.forward, **kwargs):
            values, count = {**dict(enumerate(args)), **kwargs}, len(args)
            names = [key for key, value in values.items() if isinstance(value, torch.Tensor)]
            tensors, adapter = [values.pop(key) for key in names], next(iter(layers.values())).active

            def rerun(*tensors):
                filled = {**values, **dict(zip(names, tensors))}
                with use_adapter(layers, adapter):
                    return run(*[filled.pop(i) for i in range(count)], **filled)

            parameters = [p for p in block.parameters() if p.requires_grad]
            return Checkpoint.apply(rerun, len(tensors), *tensors, *parameters)
        block.forward = forward


# The pipeline's two ends

def load_pipeline(args, device):
    """The pretrained pipeline, frozen, on the device but for the layers of its text encoders."""
    from diffusers import StableDiffusion3Pipeline as Pipeline
    dtype = {"default": {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype], "vae": torch.float32}
    try:
        # What model_index.json holds as null must be passed as None, or from_pretrained looks for it.
        absent = {key: None for key, part in Pipeline.load_config(args.model).items() if part == [None, None]}
        pipe = Pipeline.from_pretrained(args.model, dtype=dtype, low_cpu_mem_usage=False, **absent)
    except OSError as error:
        raise OSError(f"cannot load {args.model} ({str(error).strip().splitlines()[0]}). If its weights are "
                      f"gated, accept the licence on https://huggingface.co/{args.model} and run `hf auth "
                      "login`; or try `python crd.py --preset tiny`, the bundled model") from None
    for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        module.requires_grad_(False).eval()
    for part in [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part]:
        for name, layer in part.to(device).named_modules():
            if re.fullmatch(r"\D+\d+", name):  # block.3, not block.3.layer.0: on the device while it runs
                layer.to("cpu").register_forward_pre_hook(lambda layer, _: layer.to(device) and None)
                layer.register_forward_hook(lambda layer, *_: layer.to("cpu") and None)
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


@torch.no_grad()
def encode(pipe, prompts, args):
    """N prompts to (embeddings (N, L, D), pooled (N, P))."""
    parts = [pipe.encode_prompt(list(prompts[i:i + 64]), None, None, do_classifier_free_guidance=False,
                                device=pipe.vae.device, max_sequence_length=args.max_sequence_length)
             for i in range(0, len(prompts), 64)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def velocity(transformer, x, sigma, cond, uncond=None, guidance=1.0):
    """v(x, sigma, c), or with guidance v(uncond) + guidance (v(c) - v(uncond)) (Ho and Salimans 2022).

    x (B, C, H, W) float32; sigma (); cond = (embeddings (B, L, D), pooled (B, P)); uncond: those of one "".
    """
    if guidance != 1.0:
        both = [torch.cat([e.expand_as(c), c]) for e, c in zip(uncond, cond)]
        v_uncond, v_cond = velocity(transformer, torch.cat([x, x]), sigma, both).chunk(2)
        return v_uncond + guidance * (v_cond - v_uncond)
    timestep = (1000 * sigma).expand(len(x))
    return transformer(x.to(transformer.dtype), *cond, timestep, return_dict=False)[0].float()


@torch.no_grad()
def decode(pipe, latents, batch):
    """Latents (N, C, h, w) to a list of N PIL images."""
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    return [image for z in latents.split(batch)
            for image in pipe.image_processor.postprocess(pipe.vae.decode(z / scale + shift).sample)]


@torch.no_grad()
def generate(pipe, noise, steps, cond, batch, uncond=None, guidance=1.0, order=2, label="sample"):
    """Noise (N, C, h, w) and the conditions of P prompts to latents x0 (N, C, h, w), N / P images of each."""
    pipe.scheduler.set_timesteps(steps)
    latents, K, sigmas = [], len(noise) // len(cond[0]), pipe.scheduler.sigmas.to(noise.device)
    for rows in tqdm(torch.arange(len(noise)).split(batch), desc=label, leave=False):
        here = [t[rows // K] for t in cond]
        predict = lambda x, sigma: velocity(pipe.transformer, x, sigma, here, uncond, guidance)  # noqa
        latents.append(sample_ode(predict, noise[rows], sigmas, order))
    return torch.cat(latents)


# Save, resume, and the command line

def save(folder, layers, optimizer, generator, progress, prefix="transformer"):
    """A checkpoint, runs/NAME/last or best: the averaged LoRA for diffusers, and all that --resume needs."""
    adapters = {name: {key: value for key, value in layer.state_dict().items() if not key.startswith("base.")}
                for name, layer in layers.items()}
    state = {"adapters": adapters, "optimizer": optimizer.state_dict(), "rng": generator.get_state(),
             "progress": progress}
    rewards.write_aside(folder / "state.pt", lambda aside: torch.save(state, aside))
    save_lora(folder / "pytorch_lora_weights.safetensors", layers, "ema", prefix)


def restore(folder, layers, optimizer, generator, progress, args):
    """The reverse of `save`. Drops the lines of metrics.jsonl that training will write again."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    for name, layer in layers.items():
        layer.load_state_dict(state["adapters"][name], strict=False)  # the frozen base is not in it
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0].update(lr=args.lr, weight_decay=args.weight_decay)  # flags may differ
    generator.set_state(state["rng"])
    if state["progress"]["best_by"] != progress["best_by"]:  # another measure: these start anew
        fresh = progress.keys() & {"best", "best_by", "statistics"}
        state["progress"].update({key: progress[key] for key in fresh})
    progress.update(state["progress"])
    if args.epochs:
        rewards.rewind_metrics(folder.parent, progress["epoch"])


def parse(argv=None):
    """The command line to Settings: a preset's defaults, or a resumed run's, then the flags given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, usage="python crd.py [--preset tiny] [--FLAG VALUE ...]")
    for field in fields(Settings):
        kind, text = get_args(field.type)
        kind, *others = get_args(kind) or [kind]  # the choices of a Literal, or str and None of str | None
        options = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"type": float, "nargs": 4} if kind is tuple else
                   {"choices": [*filter(None, [kind, *others])]} if isinstance(kind, str) else {"type": kind})
        default = "" if field.default is None else f" [{field.default}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text + default, **options)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        path, fixed = Path(given["resume"], "args.json"), ("preset", "model", "rank", "alpha", "lora")
        defaults = json.loads(path.read_text()) if path.exists() else {}
        if defaults.keys() != asdict(Settings()).keys() or given.keys() & set(fixed):
            raise ValueError(f"--resume {path.parent}: name a run of crd.py, such as runs/NAME, and no new "
                             f"--{', --'.join(fixed)}")
        defaults.update(lora=None, checkpoint="last")
    else:
        source = rewards.default_prompts(given.get("reward", Settings.reward))
        preset = given.get("preset", source if source in PRESETS else "geneval")
        defaults = {**PRESETS[preset], "preset": preset}
    args = Settings(**{**defaults, **given})
    rewards.check_counts(args)
    task = [given[key] for key in ("preset", "reward") if key in given] or [args.reward]
    args.name = args.name or re.sub(r"[^\w.-]+", "-", "-".join(["crd", *task, f"seed{args.seed}"]))
    for wrong, message in (
            ((args.train_timesteps or 1) > args.rollout_steps, "--train-timesteps exceeds --rollout-steps"),
            (args.reward_weight and args.group_size < 2, "--group-size 1: an image alone is its own mean"),
            (not (args.reward_weight or args.anchor), "--reward-weight 0 --anchor 0: nothing to learn from")):
        if wrong:
            raise ValueError(message)
    return args


def main():
    """Train. A user's mistake ends in one line; `python -X dev crd.py` shows where it came from."""
    rewards.hush()
    args, stops = None, (ValueError, OSError, FloatingPointError, rewards.RewardError, torch.OutOfMemoryError)
    try:
        train(args := parse())
    except () if sys.flags.dev_mode else (*stops, KeyboardInterrupt) as error:
        raise SystemExit(rewards.last_words(error, args)) from None


if __name__ == "__main__":
    main()
