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

For the paper's other task, GenEval, `--parts scenes` makes a second toy in `scenes/`, of up to four
flat objects on a gray wall, in about an hour and a half of one core:

  scenes-prompts      GenEval's prompts, of eight classes and six colors
  scenes-vae          as above
  scenes-transformer  as above; it miscounts, swaps colors and misplaces
  scenes-detector     Mask2Former, narrowed: which objects there are, and where
  scenes-clip         CLIPModel, which names an object's color
  scenes-judge        a second detector and CLIP, on other sizes, turned shapes and other damage
"""

import argparse
import copy
import itertools
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
    Mask2FormerConfig,
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
    SwinConfig,
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
    """Draw a prompt such as `"moon" on a blue sign`: (image, boxes), a box (x0, y0, x1,
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
    """Prompts and images: (list of str, uint8 tensor (size, 3, 32, 64))."""
    rng = random.Random(seed)
    stream = rewards.sign_prompts("train", rng)
    prompts = [next(stream) for _ in range(size)]
    return prompts, torch.stack(
        [to_tensor(draw(p, rng)[0]) for p in tqdm(prompts, desc="draw", leave=False)]
    )


def warm_up_then_decay(optimizer, steps, warm_up):
    rule = lambda t: min((t + 1) / warm_up, max(1 - t / steps, 0.0))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rule)


def take_step(loss, optimizer, schedule):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()


def autocast():
    """bf16 on a GPU, else float32."""
    return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda")


# The image model


def train_vae(out, seed, pixels, steps=1500, batch=32):
    """A quarter-size autoencoder. Squared error draws the shapes, absolute error keeps their edges
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


def make_tokenizer(words=("on", "a", "sign", *rewards.SIGN_COLORS), length=12):
    """CLIP's tokenizer with single characters for a vocabulary, so that a model can see how a word
    is spelled; the words around it are a token each."""
    characters = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>"] + characters + [c + "</w>" for c in characters]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
    return tokenizer


def make_pipeline(vae, tokenizer):
    """A whole, untrained Stable Diffusion 3 around `vae`: 2.4 M parameters, 32 image tokens, no
    T5."""
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


def train_transformer(out, seed, tokenizer, prompts, pixels, steps=3000, stop=610, batch=96):
    """Flow matching with the text encoders, prompts encoded by the pipeline's own
    `encode_prompt`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).to(DEVICE).eval()
    vae.register_to_config(_name_or_path="vae")  # the folder's path would go into its config
    pipe = make_pipeline(vae, tokenizer).to(DEVICE)
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
        take_step(loss, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    for module in trained:
        module.eval().half()
    pipe.vae.half()
    pipe.save_pretrained(out)


# The OCR models

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def reading_data(size, seed, rough=False):
    """Signs to learn to read: prompts, images (size, 3, 32, 64) in uint8, boxes around the words
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
    }  # shrinks larger images
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
        "do_flip_channel_order": False,
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
        for row, image, (x0, y0, x1, y1) in zip(x, damage(pixels[rows].float()), cuts):
            crop = image[:, y0:y1, x0:x1]
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
        take_step(loss, optimizer, schedule)
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


def small_clip(tokenizer, width, layers, side):
    """An untrained CLIPModel for images of side x side pixels, and its image processor."""
    tower = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=4,
        num_hidden_layers=layers,
    )
    text_config = dict(
        **tower,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=tokenizer.model_max_length,
    )
    config = CLIPConfig(
        text_config=text_config,
        vision_config=dict(**tower, image_size=side, patch_size=8),
        projection_dim=width,
    )
    processor = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPModel(config).to(DEVICE).train(), processor


def train_clip(out, seed, steps=1200, batch=96):
    """CLIP at 1.3 million parameters. Beside the batch's other prompts, each prompt with one letter
    changed and with another color are its negatives, so that it has to read both."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), make_tokenizer()
    model, processor = small_clip(tokenizer, width=128, layers=3, side=WIDTH)
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
        take_step(loss, optimizer, schedule)
        bar.set_postfix(
            loss=f"{loss.item():.4f}", right=f"{(logits.argmax(1) == answer).float().mean():.2f}"
        )
    for part in (model.eval().half(), tokenizer, processor):
        part.save_pretrained(out / "clip")


# The scenes

# GenEval's colors. The image model paints with PAINTED; the rest is for the models that judge it.
PAINTS = {
    "red": (205, 40, 40),
    "orange": (240, 135, 25),
    "yellow": (240, 215, 50),
    "green": (35, 150, 60),
    "blue": (40, 80, 215),
    "purple": (130, 50, 165),
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
    "black": (20, 20, 24),
    "white": (250, 250, 250),
}
PAINTED = "red", "yellow", "green", "blue", "black", "white"
WALLS = 120, 150, 180

# Eight of COCO's classes as Pillow draws them: where, from -1 to 1, and whether with ink or eraser.
# No stroke is thinner than two pixels: the autoencoder would lose it.
INK, ERASER = 255, 0
SHAPES = {
    "sports ball": [("ellipse", (-0.95, -0.95, 0.95, 0.95), INK)],
    "kite": [("polygon", (0, -1.15, 0.9, -0.2, 0, 1.15, -0.9, -0.2), INK)],
    "book": [("polygon", (-1.15, -0.9, 0, -0.4, 1.15, -0.9, 1.15, 0.6, 0, 1.1, -1.15, 0.6), INK)],
    "umbrella": [
        ("ellipse", (-1.1, -1, 1.1, 1.1), INK),
        ("rectangle", (-1.15, 0, 1.15, 1.15), ERASER),
        ("rectangle", (-0.2, 0, 0.2, 1), INK),
    ],
    "clock": [
        ("ellipse", (-1.1, -1.1, 1.1, 1.1), INK),
        ("ellipse", (-0.6, -0.6, 0.6, 0.6), ERASER),
    ],
    "pizza": [("polygon", (-1.1, -0.95, 1.1, -0.95, 0, 1.15), INK)],
    "cup": [
        ("ellipse", (-0.3, -0.75, 1.15, 0.7), INK),
        ("ellipse", (0.05, -0.4, 0.8, 0.35), ERASER),
        ("polygon", (-1.1, -1, 0.35, -1, 0.25, 0.95, -1, 0.95), INK),
    ],
    "tv": [
        ("rectangle", (-1.15, -0.95, 1.15, 0.35), INK),
        ("rectangle", (-0.2, 0.3, 0.2, 0.8), INK),
        ("rectangle", (-0.75, 0.7, 0.75, 1.05), INK),
    ],
}


class Few(random.Random):
    """Random numbers that make `rewards.geneval_prompt` talk of the toy's classes and colors
    alone."""

    def sample(self, population, k):
        return super().sample([x for x in population if x in SHAPES or x in PAINTED], k)


def scene_prompts(seed):
    """Prompts and metadata to draw, without end, each of GenEval's tasks in turn. The reward's own
    stream has no single objects; from it the image model would not learn what an object of one
    class is."""
    rng = Few(seed)
    for task in itertools.cycle(rewards.TASKS):
        prompt, metadata = rewards.geneval_prompt(task, rng)
        if not rewards.held_out(rewards.subjects(prompt, metadata)[-1]):
            yield prompt, metadata


def stamp(name, x, y, radius, angle):
    """A class as a mask of CELL x CELL pixels with soft edges, (x, y) off its center, turned by
    degrees."""
    canvas = Image.new("L", (4 * CELL, 4 * CELL))
    pen = ImageDraw.Draw(canvas)
    for method, where, fill in SHAPES[name]:
        points = [
            4 * (CELL / 2 + offset + radius * value)
            for value, offset in zip(where, itertools.cycle((x, y)))
        ]
        getattr(pen, method)(points, fill=fill)
    return canvas.rotate(angle, Image.BICUBIC, center=(2 * CELL + 4 * x, 2 * CELL + 4 * y)).reduce(
        4
    )


def row(count, rng):
    """Corners of `count` cells side by side, in the middle of the image."""
    left = (WIDTH - count * CELL) // 2
    return [(left + i * CELL, (HEIGHT - CELL) // 2) for i in range(count)]


def column():
    """Corners of two cells, one above the other."""
    left = (WIDTH - CELL) // 2
    return [(left, 0), (left, CELL)]


def anywhere(count, rng):
    """Corners of `count` cells that do not overlap."""
    corners = []
    tries = 0
    while len(corners) < count:
        x, y = rng.randint(0, WIDTH - CELL), rng.randint(0, HEIGHT - CELL)
        if count > 3:
            x, y = x - x % CELL, y - y % CELL
        if all(max(abs(x - a), abs(y - b)) >= CELL for a, b in corners):
            corners.append((x, y))
        tries += 1
        if tries > 100:
            corners, tries = [], 0
    return corners


def cells_for(include, rng):
    """Corners of a cell for each object of GenEval's metadata: in a row or, if one is above the
    other, in a column."""
    corners = row(sum(wanted["count"] for wanted in include), rng)
    relation, _ = include[-1].get("position", ("", 0))
    if relation in ("above", "below"):
        corners = column()
        if relation == "above":
            corners.reverse()
    elif relation == "left of" or not relation and rng.random() < 0.5:
        corners.reverse()  # the second object is left of the first
    return corners


def place(include, corners, rng, rough=False):
    """What GenEval's metadata include, as (class, color, mask), each in a cell of its own. Colors
    that are not asked for are random. rough: turned and of more sizes, as the image model never
    sees them."""
    objects = []
    for wanted in include:
        for _ in range(wanted["count"]):
            shape = stamp(
                wanted["class"],
                rng.uniform(-1.4, 1.4),
                rng.uniform(-1.4, 1.4),
                rng.uniform(4.4, 6.4) if rough else rng.uniform(5.4, 6),
                rng.uniform(-12, 12) if rough else 0,
            )
            mask = Image.new("L", (WIDTH, HEIGHT))
            mask.paste(shape, corners[len(objects)])
            objects.append((wanted["class"], wanted.get("color") or rng.choice(PAINTED), mask))
    return objects


def outline(mask):
    """The mask without its soft edges."""
    return mask.point(lambda value: 255 * (value > 127))


def paint(objects, rng):
    """Draw (class, color, mask) on a gray wall."""
    wall = rng.choice(WALLS) + rng.randint(-6, 6)
    image = Image.new("RGB", (WIDTH, HEIGHT), (wall, wall, wall))
    for _, color, mask in objects:
        image.paste(tuple(c + rng.randint(-8, 8) for c in PAINTS[color]), mask=mask)
    return image


def miss_by_one(metadata, rng):
    """Metadata like these, but for one count, class, color or place: of a wrong image."""
    include = copy.deepcopy(metadata["include"])
    wanted = rng.choice(include)
    names = [name for name in SHAPES if name not in [other["class"] for other in include]]
    tag = metadata["tag"]
    if tag == "counting":
        wanted["count"] += 1 if wanted["count"] < 4 and rng.random() < 0.5 else -1
    elif tag in ("colors", "color_attr"):
        wanted["color"] = rng.choice([color for color in PAINTED if color != wanted["color"]])
    elif tag == "position":
        relation = include[1]["position"][0]
        include[1]["position"][0] = rng.choice([x for x in rewards.RELATIONS if x != relation])
    elif tag == "two_object" and rng.random() < 0.5:
        include.remove(wanted)
    else:
        wanted["class"] = rng.choice(names)
    return {**metadata, "include": include}


def scenes(size, seed):
    """Prompts and images: (list of str, uint8 tensor (size, 3, 32, 64))."""
    rng = random.Random(seed)
    pairs = list(itertools.islice(scene_prompts(seed), size))
    images = [
        to_tensor(paint(place(include, cells_for(include, rng), rng), rng))
        for include in tqdm([m["include"] for _, m in pairs], desc="draw", leave=False)
    ]
    return [prompt for prompt, _ in pairs], torch.stack(images)


def scene_tokenizer():
    """Every word of the toy's prompts is a token."""
    words = "a an photo of and two three four left right above below object colored".split()
    for name in SHAPES:
        words += (name + " " + rewards.phrase(name, 2)).split()
    return make_tokenizer(list(dict.fromkeys([*words, *rewards.COLORS])), length=16)


def crowds(size, seed, rough=False):
    """Images to find objects in: uint8 tensor (size, 3, 32, 64), and [(class, color, mask)] for
    each. One to six objects of up to three classes, in any of GenEval's colors: more than a prompt
    asks for, so that a detector counts what is there and does not guess."""
    rng = random.Random(seed)
    images, crowd = [], []
    for _ in tqdm(range(size), desc="draw", leave=False):
        names = rng.choices(rng.sample(list(SHAPES), rng.randint(1, 3)), k=rng.randint(1, 6))
        corners = anywhere(len(names), rng)
        if len(names) == 2 and rng.random() < 0.5:
            corners = column()
        elif len(names) < 5 and rng.random() < 0.75:
            corners = row(len(names), rng)
        above = min(y for _, y in corners)
        below = HEIGHT - CELL - max(y for _, y in corners)
        right, down = rng.randint(-3, 3), rng.randint(-min(above, 5), min(below, 5))
        corners = [(x + right, y + down) for x, y in corners]
        include = [{"class": name, "count": 1, "color": rng.choice([*PAINTS])} for name in names]
        objects = place(include, corners, rng, rough)
        images.append(to_tensor(paint(objects, rng)))
        crowd.append(
            [
                (name, color, to_tensor(outline(mask).convert("RGB"))[0] // 255)
                for name, color, mask in objects
            ]
        )
    return torch.stack(images), crowd


CENTERS = [(x, y) for x in range(8, WIDTH, 8) for y in range(8, HEIGHT, 8)]


def find_targets(crowd):
    """What each query has to find of images' (class, color, mask): the object with its center
    nearest to the query's. -> classes (N, queries), 80 for none; index of the object, -1 for none
    (N, queries)."""
    classes = torch.full((len(crowd), len(CENTERS)), len(rewards.CLASSES))
    index = torch.full((len(crowd), len(CENTERS)), -1)
    for i, objects in enumerate(crowd):
        for j, (name, _, mask) in enumerate(objects):
            y, x = (where.float().mean() for where in mask.nonzero(as_tuple=True))
            distances = [math.hypot(x - a, y - b) for a, b in CENTERS]
            query = distances.index(min(distances))
            classes[i, query] = rewards.CLASSES.index(name)
            index[i, query] = j
    return classes, index


def scene_detector(embed_dim=16, width=64, layers=3):
    """Mask2Former narrowed. Its masks have half of the image's resolution, not a quarter."""
    backbone = SwinConfig(
        image_size=HEIGHT,
        patch_size=2,
        embed_dim=embed_dim,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return rewards.Mask2Former(
        Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=2 * width,
            encoder_layers=1,
            decoder_layers=layers,
            num_attention_heads=4,
            dim_feedforward=2 * width,
            num_queries=len(CENTERS),
            id2label=dict(enumerate(rewards.CLASSES)),
        )
    )


def detection_loss(output, classes, masks):
    """Of all layers: cross entropy of the classes (B, queries); cross entropy and dice of the masks
    (B, queries, h, w) where there is an object."""
    found = classes < len(rewards.CLASSES)
    masks = masks[found]
    layers = [(output.class_queries_logits, output.masks_queries_logits)]
    for layer in output.auxiliary_logits:
        layers.append((layer["class_queries_logits"], layer["masks_queries_logits"]))
    loss = 0.0
    for class_logits, mask_logits in layers:
        # Classes of objects count as much as that nothing is elsewhere.
        error = F.cross_entropy(class_logits.transpose(1, 2), classes, reduction="none")
        loss = loss + error[found].mean() + error[~found].mean()
        logits = mask_logits[found]
        p = logits.sigmoid()
        overlap = 2 * (p * masks).sum((1, 2)) / (p.sum((1, 2)) + masks.sum((1, 2)))
        loss = loss + F.binary_cross_entropy_with_logits(logits, masks) + 0.2 * (1 - overlap).mean()
    return loss


def train_scene_detector(folder, seed, build, rough=False, damage=degrade, steps=2500, batch=32):
    """A model that finds the objects in damaged images.

    Each of its queries has a place to look at. (With the published loss, which assigns objects to
    the queries that fit best, objects are found twice for a long time.) In the end all logits are
    doubled: the answers are the same but over 90 % sure, as GenEval asks where it counts.
    """
    torch.manual_seed(seed)
    model = build().to(DEVICE).train()
    model.config.shortest_side = HEIGHT
    mean = torch.tensor(rewards.GenEval.mean).view(3, 1, 1)
    std = torch.tensor(rewards.GenEval.std).view(3, 1, 1)
    pixels, crowd = crowds(8000, seed, rough)
    classes, index = find_targets(crowd)
    shapes = [torch.stack([mask for *_, mask in objects]).float() for objects in crowd]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = warm_up_then_decay(optimizer, steps, 100)
    for _ in (bar := tqdm(range(steps), desc="detector")):
        rows = torch.randint(len(pixels), (batch,))
        x = (damage(pixels[rows].float()) / 255 - mean) / std
        output = model(x.to(DEVICE), output_auxiliary_logits=True)
        masks = torch.stack([shapes[i][index[i]] for i in rows])
        masks = F.avg_pool2d(masks, 2).to(DEVICE)
        loss = detection_loss(output, classes[rows].to(DEVICE), masks)
        take_step(loss, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    last = model.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1]
    for p in [*model.class_predictor.parameters(), *last.parameters()]:
        p.data.mul_(2)
    model.eval().half().save_pretrained(folder)


def cut_out(image, mask, side=32):
    """An object (3, side, side) as `rewards.GenEval` shows it to CLIP: its box, with all else in
    gray. Its edge is off by up to a pixel, as a detector's is."""
    soft = F.avg_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0]
    mask = soft > torch.empty(()).uniform_(0.15, 0.5)
    rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
    crop = torch.where(mask, image, 153.0)[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return F.interpolate(crop[None], (side, side), mode="bicubic", antialias=True)[0].clamp(0, 255)


def train_scene_clip(folder, seed, width=48, rough=False, damage=degrade, steps=400, batch=64):
    """CLIP that names the colors of objects, in the words of `rewards.GenEval.name_colors`, which a
    text of another color or class has to fit worse."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), scene_tokenizer()
    model, processor = small_clip(tokenizer, width, layers=2, side=32)
    pixels, crowd = crowds(8000, seed + 1, rough)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = warm_up_then_decay(optimizer, steps, 100)
    for _ in (bar := tqdm(range(steps), desc="clip")):
        rows = torch.randint(len(pixels), (batch,))
        chosen = [rng.choice(crowd[i]) for i in rows]
        x = torch.stack(
            [
                cut_out(image, mask)
                for image, (*_, mask) in zip(damage(pixels[rows].float()), chosen)
            ]
        )
        wording = "a photo of a " + rng.choice(("{} {}", "{}-colored {}", "{} object"))
        texts = list(
            dict.fromkeys(wording.format(color, name) for color in PAINTS for name in SHAPES)
        )
        answer = torch.tensor(
            [texts.index(wording.format(color, name)) for name, color, _ in chosen]
        )
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE)
        images = F.normalize(
            model.get_image_features(x.to(DEVICE) / 127.5 - 1).pooler_output, dim=-1
        )
        vectors = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * images @ vectors.T
        loss = F.cross_entropy(logits, answer.to(DEVICE))
        take_step(loss, optimizer, schedule)
        right = (logits.argmax(1).cpu() == answer).float().mean()
        bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{right:.2f}")
    for part in (model.eval().half(), tokenizer, processor):
        part.save_pretrained(folder)


def train_scene_judge(out, seed):
    """A second detector and CLIP, narrower, which see other sizes, turned shapes and other
    damage."""
    folder = out / "scenes/judge"
    train_scene_detector(folder / "detector", seed + 10, lambda: scene_detector(12), True, spoil)
    train_scene_clip(folder / "clip", seed + 10, 40, True, spoil)


def train_scene_transformer(out, seed):
    train_transformer(
        out / "scenes", seed, scene_tokenizer(), *scenes(24000, seed + 1), 3000, 2100, 96
    )


def write_prompts(out, lines=850, held_out=384):
    """GenEval's prompts in its own form: `prompts.jsonl` to train on, in Flow-GRPO's mixture of
    tasks, and `eval.jsonl` to evaluate, as many of each task. A task with few prompts repeats
    them."""
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", lines), ("eval", held_out)):
        pairs = itertools.islice(rewards.geneval_prompts(split, Few(0)), count)
        text = "".join(
            json.dumps({**metadata, "prompt": prompt}) + "\n" for prompt, metadata in pairs
        )
        (out / {"train": "prompts.jsonl", "eval": "eval.jsonl"}[split]).write_text(text)


PARTS = {
    "vae": lambda out, seed: train_vae(out, seed, dataset(8000, seed)[1]),
    "transformer": lambda out, seed: train_transformer(
        out, seed, make_tokenizer(), *dataset(24000, seed + 1)
    ),
    "detector": lambda out, seed: train_detector(out / "ocr-det", seed, mobile_detector),
    "recognizer": lambda out, seed: train_recognizer(out / "ocr-rec", seed, tiny_recognizer),
    "judge": train_judge,
    "clip": train_clip,
    "scenes-prompts": lambda out, seed: write_prompts(out / "scenes"),
    "scenes-vae": lambda out, seed: train_vae(
        out / "scenes", seed, crowds(8000, seed)[0], 1500, 16
    ),
    "scenes-transformer": train_scene_transformer,
    "scenes-detector": lambda out, seed: train_scene_detector(
        out / "scenes/detector", seed, scene_detector
    ),
    "scenes-clip": lambda out, seed: train_scene_clip(out / "scenes/clip", seed),
    "scenes-judge": train_scene_judge,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*PARTS, "scenes"],
        default=[name for name in PARTS if not name.startswith("scenes-")],
        help="what to train [all but the scenes]; scenes: all of theirs",
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write [this one]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in args.parts:
        for name in PARTS:
            if name == part or part == "scenes" and name.startswith("scenes-"):
                PARTS[name](args.out, args.seed)
