"""What the default commands compute on a GPU: the last table of RESULTS.md.

    python tiny-sd3/results.py --flops
"""

import argparse
import sys
from pathlib import Path

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import crd  # noqa: E402
import ddpo  # noqa: E402


def count(function):
    """TFLOP of a function's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def count_passes(network, script, targets, *inputs):
    """TFLOP of a pass without gradient, and of a checkpointed forward and backward pass."""
    script.add_lora(network, targets, 32, 64, script.ADAPTERS)
    network.enable_gradient_checkpointing(script.checkpoint)
    with torch.no_grad():
        forward = count(lambda: network(*inputs))
    return forward, count(lambda: network(*inputs)[0].sum().backward())


def print_flops():
    """What the default commands compute per image of 512 px, on the models' true sizes, without
    weights. Text encoders and rewards are left out."""
    with torch.device("meta"):
        sd3 = diffusers.SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        latents, tokens = torch.empty(1, 16, 64, 64), torch.empty(1, 77 + 128, 4096)
        inputs = (latents, tokens, torch.empty(1, 2048), torch.empty(1), None, None, False)
        forward, train = count_passes(sd3, crd, crd.TARGET_MODULES, *inputs)
        targets = ddpo.StableDiffusion.target_modules
        small = torch.empty(1, 4, 64, 64)
        inputs = (small, torch.empty(1), torch.empty(1, 77, 768))
        unet_forward, unet_train = count_passes(unet, ddpo, targets, *inputs)
        with torch.no_grad():
            decode = count(lambda: vae.decode(small))
    print(f"SD 3.5 Medium: pass {forward:.2f} TFLOP, trained {train:.2f}; VAE {decode:.2f}")
    print(f"SD 1.4: pass {unet_forward:.2f} TFLOP, trained {unet_train:.2f}")
    commands = {}
    for flags in ("--reward ocr", "--reward ocr --groups 12 --train-timesteps 4"):
        args = crd.parse(flags.split())
        sigma = train + forward + 2 * forward  # the policy, `old`, the guided reference
        image = args.rollout_steps * forward + decode + args.train_timesteps * sigma
        commands[f"crd.py {flags}"] = (image, args.groups * args.group_size, args.epochs)
    args = ddpo.parse([])
    image = 2 * args.steps * (unet_forward + unet_train) + decode  # 2: with guidance
    commands["ddpo.py"] = (image, args.images, args.epochs)
    print("| Command | TFLOP per image | PFLOP per epoch | H100: minutes, days | 24 GB card |")
    print("|---" * 5 + "|")
    for command, (image, images, epochs) in commands.items():
        cells = [f"{image:.0f}", f"{image * images / 1000:.1f}"]
        for peak in (989, 165):  # TFLOP/s in bf16, of which 40 % are assumed
            minutes = image * images / (0.4 * peak) / 60
            cells.append(f"{minutes:.1f}, {minutes * epochs / 60 / 24:.1f}")
        print(f"| `{command}` |", " | ".join(cells), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", action="store_true", required=True)
    parser.parse_args()
    print_flops()
