"""Reward-weighted regression, the baselines of DDPO's paper (Black et al. 2023, sec. 4.2), on
ddpo.py's parts: its models, rollout, evaluation and files.

Draw images as DDPO does, score them, and train a denoising loss on them, weighted by their
advantages (`rwr`), or on the best alone (`rwr-sparse`). The sampler's steps are not kept: each
image is noised anew, to random ones of the sampler's noise levels.

    python tiny-sd3/rwr.py --preset tiny             # weights softmax(advantage / temperature)
    python tiny-sd3/rwr.py --preset tiny --sparse    # the best tenth

In one process. Its runs have the same files as ddpo.py's, and are resumed in the same way.
"""

import itertools
import json
import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo  # noqa: E402
import rewards  # noqa: E402


@dataclass
class Settings(ddpo.Settings):
    """Those of ddpo.py. Leave `algorithm` and `clip` as they are: they are not used."""

    sparse: bool = ddpo.arg(False, "train on the best images alone, equally weighted")
    temperature: float = ddpo.arg(0.2, "weights are softmax(advantage / this) over an epoch")
    keep: float = ddpo.arg(0.1, "share of the images that is trained on, if sparse")


PRESETS = ddpo.PRESETS


def rwr_weights(advantages, temperature=0.2):
    """softmax(A / temperature) over N images, times N: 1 on average.

    The authors' code has softmax(0.2 R), whose sharpness depends on the reward's unit.
    """
    return torch.softmax(advantages / temperature, 0) * len(advantages)


def best_images(advantages, keep=0.1):
    """Indices of the best `keep` of N images, repeated to N, as many as `rwr` takes."""
    N = len(advantages)
    count = max(round(keep * N), 1)
    return advantages.topk(count).indices.repeat(math.ceil(N / count))[:N]


def noised(model, x0, noise, i):
    """Images (B, ...) at steps i (B,), and what the network has to predict of them."""
    if isinstance(model, ddpo.StableDiffusion):
        return model.scheduler.add_noise(x0, noise, model.t[i]), noise
    sigma = model.sigmas[i].view(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise, noise - x0


def regression_loss(model, x0, weights, cond, uncond, args, generator):
    """mean w (f - target)^2, each image at a random step. f is guided, as it is in sampling."""
    i = torch.randint(args.steps, (len(x0),), generator=generator, device=x0.device)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    x, target = noised(model, x0, noise, i)
    f = ddpo.guided(model, x, i, cond, uncond, args.guidance)
    return (weights * (f - target).square().flatten(1).mean(1)).mean()


def train_epoch(args, epoch, step, pipe, model, uncond, layers, optimizer, source, reward, history):
    """Sample, score, regress: ddpo.train_epoch, but for what is learned from the images."""
    device = pipe.vae.device
    K = args.group_size
    N = args.images
    per_update = N // args.updates
    starts = range(0, N, per_update)
    # ddpo.py's micro-batches, so that a seed's first images are the same.
    micro_batches = sum((ddpo.batches(i, i + per_update, args.micro_batch) for i in starts), [])
    noisy_steps = args.steps - args.deterministic_steps
    seed = random.Random(f"{args.seed} {epoch} {ddpo.PROCESS}").getrandbits(63)
    generator = torch.Generator(device).manual_seed(seed)
    clock = [time.perf_counter()]

    # 1. Roll out.
    stream = rewards.prompts(source, "train", seed, exclude=args.eval_prompts)
    pairs = list(itertools.islice(stream, N // K))
    cond = [c.repeat_interleave(K, 0) for c in ddpo.encode(pipe, model, [p for p, _ in pairs])]
    noise = torch.randn(N, *model.shape, generator=generator, device=device)
    x0, _, _ = ddpo.rollout(model, noise, cond, uncond, micro_batches, noisy_steps, args, generator)
    images = ddpo.decode(pipe, x0)
    clock.append(time.perf_counter())

    # 2. Score.
    prompts, metadata = zip(*[pair for pair in pairs for _ in range(K)])
    R, values = reward.score(images, prompts, metadata)
    A = ddpo.prompt_advantages(history, prompts, R, args.stat_min).to(device)
    clock.append(time.perf_counter())

    # 3. Regress on the images, shuffled.
    parameters = optimizer.param_groups[0]["params"]
    order = torch.randperm(N, generator=generator, device=device)
    weights = rwr_weights(A, args.temperature)
    if args.sparse:
        order = best_images(A, args.keep)[order]
        weights = torch.ones_like(A)
    totals = defaultdict(float)
    for update_rows in ddpo.bar(order.split(per_update), "train"):
        # As many noise levels for each image as the sampler has.
        for rows, _ in itertools.product(update_rows.split(args.micro_batch), range(args.steps)):
            c = [part[rows] for part in cond]
            loss = regression_loss(model, x0[rows], weights[rows], c, uncond, args, generator)
            share = len(rows) / per_update / args.steps
            (share * loss).backward()
            totals["loss"] += share / args.updates * loss.detach()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        totals["grad_norm"] += norm / args.updates
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ddpo.ema_update(layers, "ema", min(args.ema, (1 + step) / (10 + step)))
    clock.append(time.perf_counter())

    values |= {name: total.item() for name, total in totals.items()}
    for phase, start, stop in zip(("rollout", "reward", "train"), clock, clock[1:]):
        values[f"{phase}_seconds"] = stop - start
    return R, values


def train(args):
    """A run of ddpo.py that regresses. Returns its folder."""
    if ddpo.PROCESSES > 1:
        raise ValueError("rwr.py has one process")
    return ddpo.train(args, train_epoch)


def parse(argv=None):
    """Settings from the command line: flags over a preset's defaults, or over a resumed run's."""
    parser = HfArgumentParser(Settings, description=__doc__.splitlines()[0])
    flags = parser.parse_args(argv)  # a first time, to know which defaults to set
    if flags.resume:
        defaults = json.loads(Path(flags.resume, "args.json").read_text())
        if defaults.keys() != asdict(Settings()).keys():
            raise ValueError(f"{flags.resume} holds no run of rwr.py")
    else:
        algorithm = "rwr-sparse" if flags.sparse else "rwr"
        name = f"{algorithm}-{flags.preset}-seed{flags.seed}"
        defaults = {"name": name, **PRESETS[flags.preset]}
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)[0]


if __name__ == "__main__":
    train(parse())
