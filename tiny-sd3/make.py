"""How tiny-sd3 was made, from nothing but Pillow's built-in fonts.

    python tiny-sd3/make.py             # about half an hour on 2 CPU cores
    python tiny-sd3/make.py --parts detector recognizer

Six things are trained, each on words drawn in white capitals on a colored sign, one letter a cell:

  vae          AutoencoderKL, 32 x 64 pixels to 16 x 8 x 16 latents
  transformer  SD3Transformer2DModel and its two CLIP text encoders, by flow matching
  detector     PP-OCRv5's mobile detector, narrowed: which pixels belong to a line of text
  recognizer   PP-OCRv6's tiny recognizer, narrowed: what a line of text says (CTC)
  judge        a second pair of OCR models, of other architectures, on other letter shapes and other
               damage
  clip         CLIPModel, which reads the word and sees the color

The last two are judges: they look at what reinforcement learning makes of the toy, which never
learns from them. The transformer stops early on purpose. It then draws letters and misspells most
words, which leaves reinforcement learning something to do. Words held out for evaluation
(`rewards.held_out`) are never drawn.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import (
    AddedToken,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    HGNetV2Config,
    PPLCNetV3Config,
    PPLCNetV4Config,
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5ServerRecConfig,
    PPOCRV5ServerRecForTextRecognition,
    PPOCRV6SmallDetConfig,
    PPOCRV6SmallDetForObjectDetection,
    PPOCRV6TinyRecConfig,
    PPOCRV6TinyRecForTextRecognition,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rewards  # noqa: E402  (the prompts and the held-out split are the ones crd.py trains on)

HEIGHT, WIDTH, CELL = 32, 64, 16
FONT, LARGE, BITMAP = (
    ImageFont.load_default(17),
    ImageFont.load_default(40),
    ImageFont.load_default_imagefont(),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# The data


def draw(prompt, rng, rough=False):
    """The picture of a prompt such as `"moon" on a blue sign`: (image, boxes), a box (x0, y0, x1,
    y1) a letter. rough: the letters have shapes that the image model never sees."""
    word, color = prompt.split('"')[1], prompt.split()[-2]
    wall = rng.randint(205, 235)
    image = Image.new("RGB", (WIDTH, HEIGHT), (wall, wall, wall - 8))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle(
        (0, 1 + rng.randint(0, 1), WIDTH - 1, HEIGHT - 2 - rng.randint(0, 1)),
        radius=4,
        fill=tuple(c + rng.randint(-10, 10) for c in rewards.SIGN_COLORS[color]),
    )
    left = (WIDTH - CELL * len(word)) / 2
    boxes = []
    for i, letter in enumerate(word.upper()):
        center = (left + CELL * (i + 0.5) + rng.uniform(-1, 1), HEIGHT / 2 + rng.uniform(-1.5, 1.5))
        if rough:
            mask = rough_letter(letter, rng)
            x, y = (round(c - side / 2 + rng.uniform(-1, 1)) for c, side in zip(center, mask.size))
            pen.bitmap((x, y), mask, fill="white")
            boxes.append((x, y, x + mask.width, y + mask.height))
        else:
            pen.text(center, letter, font=FONT, fill="white", anchor="mm")
            boxes.append(pen.textbbox(center, letter, font=FONT, anchor="mm"))
    return image, boxes


def rough_letter(letter, rng):
    """The mask of a letter, light, bold or from a bitmap font with serifs, then stretched and
    turned."""
    font, stroke = rng.choice([(BITMAP, 0), (BITMAP, 0), *((LARGE, stroke) for stroke in range(4))])
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).text((8, 8), letter, 255, font, stroke_width=stroke)
    mask = mask.crop(mask.getbbox())
    height = rng.uniform(10, 15)
    width = min(max(height * mask.width / mask.height * rng.uniform(0.75, 1.25), 2), CELL)
    mask = mask.resize((round(width), round(height)), Image.BICUBIC)
    return mask.rotate(rng.uniform(-10, 10), Image.BICUBIC, expand=True)


def to_tensor(image):
    """PIL image to a uint8 tensor (3, H, W)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def dataset(size, seed):
    """Prompts and pictures: (list of str, uint8 tensor (size, 3, 32, 64))."""
    rng = random.Random(seed)
    stream = rewards.sign_prompts("train", rng)
    prompts = [next(stream) for _ in range(size)]
    return prompts, torch.stack(
        [to_tensor(draw(p, rng)[0]) for p in tqdm(prompts, desc="draw", leave=False)]
    )


def warm_up_then_decay(optimizer, steps, warm_up):
    rule = lambda t: min((t + 1) / warm_up, max(1 - t / steps, 0.0))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rule)


def autocast():
    """bf16 on a GPU, else float32."""
    return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda")


# The image model


def train_vae(out, seed, steps=1500, batch=32):
    """A quarter-size autoencoder. Squared error draws the letters, absolute error keeps their edges
    sharp."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        sample_size=WIDTH,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(DEVICE)
    _, pixels = dataset(8000, seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = warm_up_then_decay(optimizer, steps, 50)
    for _ in (bar := tqdm(range(steps), desc="vae")):
        x = pixels[torch.randint(len(pixels), (batch,))].to(DEVICE) / 127.5 - 1
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = y.float() - x
        loss = (
            error.square().mean()
            + 0.3 * error.abs().mean()
            + 1e-5 * posterior.kl().mean() / x[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", l1=f"{error.abs().mean().item():.4f}")
    vae.eval()
    with torch.no_grad():
        z = vae.encode(pixels[:512].to(DEVICE) / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    vae.half().save_pretrained(out / "vae")


def make_tokenizer():
    """CLIP's tokenizer with single characters for a vocabulary, so that a model can see how a word
    is spelled; the words around it are a token each."""
    characters = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>"] + characters + [c + "</w>" for c in characters]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12
    )
    whole = "on", "a", "sign", *rewards.SIGN_COLORS
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in whole])
    return tokenizer


def make_pipeline(vae):
    """A whole, untrained Stable Diffusion 3 around `vae`: 2.4 M parameters, 32 image tokens, no
    T5."""
    tokenizer = make_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def train_transformer(out, seed, steps=3000, stop=610, batch=96):
    """Flow matching with the text encoders, prompts encoded by the pipeline's own
    `encode_prompt`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).to(DEVICE).eval()
    vae.register_to_config(_name_or_path="vae")  # the folder's path would go into its config
    pipe = make_pipeline(vae).to(DEVICE)
    prompts, pixels = dataset(24000, seed + 1)
    latents = []
    with torch.no_grad(), autocast():
        for x in tqdm(pixels.split(96), desc="encode", leave=False):
            z = vae.encode(x.to(DEVICE) / 127.5 - 1).latent_dist.mode()
            latents.append((z.float() - vae.config.shift_factor) * vae.config.scaling_factor)
    latents = torch.cat(latents)

    trained = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    parameters = [p for module in trained for p in module.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = warm_up_then_decay(optimizer, steps, 100)
    for step in (bar := tqdm(range(stop), desc="transformer")):
        rows = torch.randint(len(prompts), (batch,))
        text = ["" if torch.rand(()) < 0.1 else prompts[i] for i in rows.tolist()]
        x0, noise = latents[rows], torch.randn(batch, *latents.shape[1:], device=DEVICE)
        sigma = torch.randn(batch, device=DEVICE).sigmoid()
        x = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
        with autocast():
            embeds, _, pooled, _ = pipe.encode_prompt(
                text,
                None,
                None,
                device=DEVICE,
                max_sequence_length=1,
                do_classifier_free_guidance=False,
            )
            v = pipe.transformer(x, embeds, pooled, 1000 * sigma, return_dict=False)[0]
        loss = F.mse_loss(v.float(), noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    for module in trained:
        module.eval().half()
    pipe.vae.half()
    pipe.save_pretrained(out)


# The OCR models

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def reading_data(size, seed, rough=False):
    """Signs to learn to read: prompts, pictures (size, 3, 32, 64) in uint8, boxes around the words
    (size, 4).

    Half of the words are the transformer's; half are up to four random letters or gaps, so that the
    letters are read and no spelling is guessed. A blank sign's box is (0, 0, 0, 0).
    """
    rng = random.Random(seed)
    stream = rewards.sign_prompts("train", rng)
    prompts, pixels, boxes = [], [], []
    for _ in tqdm(range(size), desc="draw", leave=False):
        prompt = next(stream)
        text = "".join(rng.choices(ALPHABET.lower() + "   ", k=rng.randint(0, 4)))
        if rng.random() < 0.5 and not rewards.held_out(text.replace(" ", "")):
            prompt = f'"{text}" on a {rng.choice([*rewards.SIGN_COLORS])} sign'
        text = prompt.split('"')[1]
        image, letters = draw(prompt, rng, rough)
        letters = [box for box, letter in zip(letters, text) if letter != " "] or [(0, 0, 0, 0)]
        prompts.append(prompt)
        pixels.append(to_tensor(image))
        boxes.append([f(values) for f, values in zip((min, min, max, max), zip(*letters))])
    return prompts, torch.stack(pixels), torch.tensor(boxes, dtype=torch.float32)


def degrade(x):
    """What a weak model does to signs (B, 3, 32, 64) in 0..255: ghosts of other words, blur,
    noise."""
    uniform = lambda lo, hi: torch.empty(len(x), 1, 1, 1).uniform_(lo, hi)  # noqa: E731
    x = torch.lerp(x, x[torch.randperm(len(x))], uniform(-0.3, 0.3).clamp(min=0))
    if torch.rand(()) < 0.5:
        size = [round(side * torch.empty(()).uniform_(0.5, 1).item()) for side in x.shape[2:]]
        small = F.interpolate(x, size, mode="bilinear", antialias=True)
        x = F.interpolate(small, x.shape[2:], mode="bilinear")
    gray = x.mean((1, 2, 3), keepdim=True)
    x = gray + uniform(0.6, 1.2) * (x - gray) + uniform(-20, 20)
    return (x + uniform(-15, 15).clamp(min=0) * torch.randn_like(x)).clamp(0, 255)


def spoil(x):
    """What else can go wrong with signs (B, 3, 32, 64) in 0..255: stains, uneven light and color,
    specks."""
    normal = lambda *size: torch.randn(len(x), *size)  # noqa: E731
    stains = F.interpolate(normal(3, 4, 8), x.shape[2:], mode="bicubic")
    x = x * (1 + 0.1 * normal(3, 1, 1)) + torch.empty(len(x), 1, 1, 1).uniform_(0, 15) * stains
    specks = torch.rand(len(x), 1, *x.shape[2:]) < torch.empty(len(x), 1, 1, 1).uniform_(0, 0.06)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, torch.empty(len(x), 1, 1, 1).uniform_(0, 1))
    return torch.where(specks, 255 * torch.rand(len(x), 1, *x.shape[2:]), x).clamp(0, 255)


def text_maps(boxes):
    """Boxes (B, 4) to what the detector should answer, (B, 32, 64): 1 in the core of each line, 0
    elsewhere.

    `rewards.find_boxes` grows a core by area * 1.5 / perimeter on every side; this takes away the d
    that it gives back, the smaller root of 7 d^2 - 2.5 (w + h) d + 0.75 w h = 0.
    """
    x0, y0, x1, y1 = (boxes + boxes.new_tensor([-2, -2, 1, 1])).unbind(
        1
    )  # a little air; pixel centers
    w, h = x1 - x0, y1 - y0
    d = (2.5 * (w + h) - (6.25 * (w + h) ** 2 - 21 * w * h).sqrt()) / 14
    x, y = torch.arange(WIDTH).view(1, 1, -1), torch.arange(HEIGHT).view(1, -1, 1)
    x0, y0, x1, y1 = (v.round().view(-1, 1, 1) for v in (x0 + d, y0 + d, x1 - d, y1 - d))
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    return (inside & (boxes[:, 2] > boxes[:, 0]).view(-1, 1, 1)).float()


def save_ocr_model(model, settings, folder):
    model.eval().half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def mobile_detector():
    """PP-OCRv5's mobile detector at 38 thousand parameters."""
    backbone = PPLCNetV3Config(
        stem_channels=8,
        conv_symmetric_num=1,
        out_features=["stage2", "stage3", "stage4", "stage5"],
        block_configs=[
            [[3, 8, 16, 1, False]],
            [[3, 16, 24, 2, False]],
            [[3, 24, 32, 2, False], [3, 32, 32, 1, False]],
            [[3, 32, 48, 2, False], [5, 48, 48, 1, False]],
            [[5, 48, 64, 2, True]],
        ],
    )
    return PPOCRV5MobileDetForObjectDetection(
        PPOCRV5MobileDetConfig(
            backbone_config=backbone, neck_out_channels=32, layer_list_out_channels=[16, 16, 24, 32]
        )
    )


def train_detector(folder, seed, build, rough=False, damage=degrade, steps=900, batch=64):
    """A model that finds lines of text in damaged signs; cross-entropy plus Dice, as in DBNet."""
    torch.manual_seed(seed)
    model = build().to(DEVICE).train()
    settings = {
        "image_mean": [0.406, 0.456, 0.485],
        "image_std": [0.225, 0.224, 0.229],
        "limit_side_len": WIDTH,
        "limit_type": "resize_long",
    }  # shrinks larger pictures
    mean, std = (
        torch.tensor(settings[key], device=DEVICE).view(3, 1, 1)
        for key in ("image_mean", "image_std")
    )
    _, pixels, boxes = reading_data(12000, seed, rough)
    targets = text_maps(boxes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = warm_up_then_decay(optimizer, steps, 50)
    for _ in (bar := tqdm(range(steps), desc="detector")):
        rows = torch.randint(len(pixels), (batch,))
        x = ((damage(pixels[rows].float()).to(DEVICE) / 255 - mean) / std).flip(1)
        y, target = model(pixel_values=x).last_hidden_state[:, 0], targets[rows].to(DEVICE)
        dice = 1 - 2 * (y * target).sum() / (y.sum() + target.sum())
        loss = F.binary_cross_entropy(y, target) + dice
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    save_ocr_model(model, settings, folder)


def tiny_recognizer():
    """PP-OCRv6's tiny recognizer at 90 thousand parameters."""
    backbone = PPLCNetV4Config(
        stem_channels=[3, 12, 16],
        stem_type="small",
        hidden_act="hardswish",
        out_features=["stage4"],
        block_configs=[
            [[3, 16, 16, 1, False]],
            [[3, 16, 24, 1, False]],
            [[3, 24, 48, [2, 1], False], [3, 48, 48, 1, True]],
            [[3, 48, 96, [2, 1], False], [3, 96, 96, 1, False]],
        ],
    )
    return PPOCRV6TinyRecForTextRecognition(
        PPOCRV6TinyRecConfig(
            backbone_config=backbone, hidden_size=64, head_out_channels=1 + len(ALPHABET)
        )
    )


def train_recognizer(
    folder, seed, build, width=192, rough=False, damage=degrade, steps=1500, batch=64
):
    """A model that reads lines of text cut from damaged signs, as a detector might cut them; CTC.
    Lines are scaled to 48 pixels of height and at most `width`. The signs' lines are level, and of
    a level box `rewards.cut_out` gives the same pixels as a slice."""
    torch.manual_seed(seed)
    model = build().to(DEVICE).train()
    height, size = 48, {"height": 48, "width": width}
    settings = {
        "size": size,
        "pad_size": size,
        "max_image_width": width,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "character_list": ["blank", *ALPHABET],
    }
    prompts, pixels, boxes = reading_data(16000, seed + 1, rough)
    words = [prompt.split('"')[1].replace(" ", "").upper() for prompt in prompts]
    words, pixels, boxes = (
        [w for w in words if w],
        *(t[[bool(w) for w in words]] for t in (pixels, boxes)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = warm_up_then_decay(optimizer, steps, 50)
    for _ in (bar := tqdm(range(steps), desc="recognizer")):
        rows = torch.randint(len(pixels), (batch,))
        air = torch.empty(batch, 4).uniform_(0, 3.5) * torch.tensor([-1, -1, 1, 1])
        cuts = (boxes[rows] + air).round().long().clamp(min=0).tolist()
        x = torch.zeros(batch, 3, height, width)
        for row, picture, (x0, y0, x1, y1) in zip(x, damage(pixels[rows].float()), cuts):
            crop = picture[:, y0:y1, x0:x1]
            scaled = min(math.ceil(height * crop.shape[2] / crop.shape[1]), width)
            row[:, :, :scaled] = rewards.resize(crop, (height, scaled)) / 127.5 - 1
        answers = [
            torch.tensor([1 + ALPHABET.index(letter) for letter in words[i]]) for i in rows.tolist()
        ]
        y = model(
            pixel_values=x.to(DEVICE)
        ).last_hidden_state  # (batch, steps, classes), probabilities
        loss = F.ctc_loss(
            y.clamp(min=1e-7).log().transpose(0, 1).cpu(),
            torch.cat(answers),
            torch.full((batch,), y.shape[1]),
            torch.tensor([len(a) for a in answers]),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    save_ocr_model(model, settings, folder)


# The judges


def small_detector():
    """PP-OCRv6's small detector on PP-OCRv5's server backbone, at 32 thousand parameters."""
    backbone = HGNetV2Config(
        stem_channels=[3, 8, 12],
        stage_in_channels=[12, 16, 24, 32],
        stage_mid_channels=[8, 12, 16, 16],
        stage_out_channels=[16, 24, 32, 48],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return PPOCRV6SmallDetForObjectDetection(
        PPOCRV6SmallDetConfig(
            backbone_config=backbone, neck_out_channels=32, layer_list_out_channels=[16, 24, 32, 48]
        )
    )


def server_recognizer():
    """PP-OCRv5's server recognizer at 122 thousand parameters."""
    backbone = HGNetV2Config(
        stem_channels=[3, 8, 12],
        stem_strides=[2, 1, 1, 1, 1],
        stage_in_channels=[12, 24, 32, 48],
        stage_mid_channels=[12, 16, 24, 32],
        stage_out_channels=[24, 32, 48, 96],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
        stage_downsample=[True] * 4,
        stage_downsample_strides=[[2, 1], [1, 2], [2, 1], [2, 1]],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return PPOCRV5ServerRecForTextRecognition(
        PPOCRV5ServerRecConfig(
            backbone_config=backbone,
            hidden_size=64,
            num_attention_heads=4,
            head_out_channels=1 + len(ALPHABET),
        )
    )


def train_judge(out, seed):
    train_detector(out / "judge/ocr-det", seed + 10, small_detector, True, spoil)
    train_recognizer(out / "judge/ocr-rec", seed + 10, server_recognizer, 128, True, spoil)


def near_misses(prompt, rng):
    """A prompt with one letter of its word changed, and one with another color."""
    word, color = prompt.split('"')[1], prompt.split()[-2]
    i, letter = rng.randrange(len(word)), rng.choice(ALPHABET.lower())
    other = rng.choice([c for c in rewards.SIGN_COLORS if c != color])
    if letter == word[i]:
        return near_misses(prompt, rng)
    return f'"{word[:i]}{letter}{word[i + 1 :]}" on a {color} sign', f'"{word}" on a {other} sign'


def train_clip(out, seed, steps=1200, batch=96):
    """CLIP at 1.3 million parameters. Beside the batch's other prompts, each prompt with one letter
    changed and with another color are its negatives, so that it has to read both."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), make_tokenizer()
    layers = dict(
        hidden_size=128, intermediate_size=512, num_attention_heads=4, num_hidden_layers=3
    )
    model = (
        CLIPModel(
            CLIPConfig(
                text_config=dict(
                    **layers,
                    vocab_size=len(tokenizer),
                    bos_token_id=0,
                    eos_token_id=1,
                    pad_token_id=1,
                    max_position_embeddings=tokenizer.model_max_length,
                ),
                vision_config=dict(**layers, image_size=WIDTH, patch_size=8),
                projection_dim=128,
            )
        )
        .to(DEVICE)
        .train()
    )
    processor = CLIPImageProcessorPil(
        size={"height": WIDTH, "width": WIDTH},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    signs = [
        (p, x)
        for rough in (False, True)
        for p, x in zip(*reading_data(16000, seed + rough, rough)[:2])
        if p.split('"')[1].isalpha()
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = warm_up_then_decay(optimizer, steps, 100)
    for _ in (bar := tqdm(range(steps), desc="clip")):
        prompts, x = zip(*rng.sample(signs, batch))
        x = torch.stack(x).float()
        x = torch.cat(
            [x[: batch // 3], degrade(x[batch // 3 : 2 * batch // 3]), spoil(x[2 * batch // 3 :])]
        )
        x = F.interpolate(x, (WIDTH, WIDTH), mode="bicubic").clamp(0, 255) / 127.5 - 1
        letters, colors = zip(*(near_misses(prompt, rng) for prompt in prompts))
        text = tokenizer([*prompts, *letters, *colors], padding=True, return_tensors="pt").to(
            DEVICE
        )
        with autocast():
            images = F.normalize(
                model.get_image_features(pixel_values=x.to(DEVICE)).pooler_output, dim=-1
            )
            texts = F.normalize(model.get_text_features(**text).pooler_output, dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * images.float() @ texts.float().T
        answer = torch.arange(batch, device=DEVICE)
        loss = F.cross_entropy(logits, answer) + F.cross_entropy(logits[:, :batch].T, answer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(
            loss=f"{loss.item():.4f}", right=f"{(logits.argmax(1) == answer).float().mean():.2f}"
        )
    for part in (model.eval().half(), tokenizer, processor):
        part.save_pretrained(out / "clip")


PARTS = {
    "vae": train_vae,
    "transformer": train_transformer,
    "detector": lambda out, seed: train_detector(out / "ocr-det", seed, mobile_detector),
    "recognizer": lambda out, seed: train_recognizer(out / "ocr-rec", seed, tiny_recognizer),
    "judge": train_judge,
    "clip": train_clip,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to train"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write [this one]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in args.parts:
        PARTS[part](args.out, args.seed)
