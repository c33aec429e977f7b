"""Rewards and prompts: what the two algorithms optimise, and what they draw.

A reward looks at finished pictures and gives each a number; nothing here is differentiated.

    reward = load("ocr", "cuda")                              # text rendering, read by PP-OCRv5
    reward = load("ocr@tiny-sd3", "cpu")                      # the same with the models of a folder
    reward = load("ocr:1,incompressibility:-0.005", "cuda")   # a weighted sum
    rewards = reward(images, prompts, metadata)               # PIL images, str, dict -> (B,) tensor on CPU
    rewards, parts = reward.score(images, prompts, metadata)  # the same, and {name: (B,)} unweighted, to log

A spec is `name[@path-or-repo][:weight]`, several joined by commas. A prompt comes with its metadata, a dict
that says at least `where` it came from: `prompts(source, split, seed)` yields such pairs.

    file size            compressibility, incompressibility
    text rendering       ocr
    the CLIP family      clipscore, pickscore, hpsv2, aesthetic
    BLIP                 imagereward
    talking models       vlm, unifiedreward
    object detection     geneval

To add a reward, subclass `Reward`: give it a `name`, a `range`, a `measure`, a `check` if it cannot score
every prompt, and a line in `REWARDS`. A reward that fails stops the run. It never quietly becomes 0: an
optimiser would learn from that zero.

All of it runs on torch, transformers and Pillow. Where an image processor of transformers needs torchvision
or OpenCV, or differs from what the reward was published with, what it does takes a few lines here. Models are
in bf16 on a GPU and in float32 on a CPU, and what is compared (cosines, heads, probabilities) in float32.
Weights are read from safetensors or by torch's weights-only loader: no file can run code.
"""

import contextlib
import io
import json
import math
import os
import random
import re
import textwrap
import zlib
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

EVAL_SIZE = 512  # evaluation prompts, at most


# The interface

class RewardError(RuntimeError):
    """A reward that failed, with its name and the cause, in one line."""


class Reward:
    """Scores pictures. `range` = (lo, hi) is where they lie, used only to put them on [0, 1]: `normalize`.

    prompts: the prompt generator that suits it. batch: pictures a model is shown at once. details: what a
    benchmark reports of the pictures last scored besides their rewards, {row: value}; empty for most.
    """

    name, range, prompts, batch, details = "reward", (0.0, 1.0), "animals", 16, {}

    def __init__(self, path, device):
        """path: what follows the @ of the spec, or None. ValueError or OSError where it cannot be loaded."""
        if path:
            raise ValueError(f"reward {self.name} has no weights to load: leave out @{path}")

    def check(self, prompts, metadata, where=None):
        """Raises ValueError for a prompt that cannot be scored. Called before the first picture is sampled.

        where: a str a prompt, such as "words.txt, line 3"; by default what its metadata says.
        """

    def measure(self, images, prompts, metadata):
        """What a subclass writes: a number for each PIL image, as a list or a tensor (B,)."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, images, prompts, metadata):
        """Rewards (B,) and their parts {name: (B,)}, float32 on the CPU. Any failure is a RewardError."""
        try:
            scores = torch.as_tensor(self.measure(images, prompts, metadata)).detach().float().cpu()
        except Exception as cause:
            raise RewardError(f"reward {self.name} failed: {type(cause).__name__}: {cause}") from cause
        if scores.shape != (len(images),):
            raise RewardError(f"reward {self.name} gave scores of shape {tuple(scores.shape)} "
                              f"for {len(images)} images")
        if not scores.isfinite().all():
            i = int((~scores.isfinite()).nonzero()[0])
            raise RewardError(f"reward {self.name} gave {scores[i].item()} for the prompt {prompts[i]!r}")
        return scores, {self.name: scores}

    def __call__(self, images, prompts, metadata):
        return self.score(images, prompts, metadata)[0]

    def in_batches(self, function, *lists):
        """`function` of at most `batch` items of each list at a time: tensors are joined, lists chained."""
        starts = range(0, len(lists[0]), self.batch)
        results = [function(*(items[i:i + self.batch] for items in lists)) for i in starts]
        return torch.cat(results) if torch.is_tensor(results[0]) else sum(results, [])


class WeightedSum(Reward):
    """`sum_i weight_i reward_i`. A negative weight turns its part's range around."""

    def __init__(self, parts):
        """parts: list of (weight, Reward), the rewards' names distinct."""
        self.parts = parts
        terms = (reward.name if weight == 1 else f"{weight:g} {reward.name}" for weight, reward in parts)
        self.name = " + ".join(terms).replace("+ -", "- ")
        ends = [sorted((weight * reward.range[0], weight * reward.range[1])) for weight, reward in parts]
        self.range = (sum(lo for lo, _ in ends), sum(hi for _, hi in ends))

    def check(self, prompts, metadata, where=None):
        for _, reward in self.parts:
            reward.check(prompts, metadata, where)

    def score(self, images, prompts, metadata):
        parts = {reward.name: reward(images, prompts, metadata) for _, reward in self.parts}
        return sum(weight * parts[reward.name] for weight, reward in self.parts), parts


def load(spec, device, batch=16):
    """The Reward of `name[@path-or-repo][:weight],...`, its models on `device`.

    batch: pictures that a model is shown at once. `ocr` takes as many as a fixed number of pixels allows.
    ValueError: an unknown name or a malformed spec. OSError: weights that cannot be loaded.
    """
    parts = parse_spec(spec)
    names, rewards = [name for _, name, _, _ in parts], []
    for weight, name, path, head in parts:
        reward = REWARDS[name](path, torch.device(device))
        reward.name, reward.batch = name if names.count(name) == 1 else head, batch
        rewards.append((weight, reward))
    return rewards[0][1] if len(rewards) == 1 and rewards[0][0] == 1 else WeightedSum(rewards)


def load_unseen(spec, trained, device, batch=16):
    """The Reward of those in `spec`, which may be empty, that the spec `trained` has not; None if all are."""
    heads = [head for *_, head in parse_spec(trained)]
    unseen = ",".join(head for *_, head in (parse_spec(spec) if spec else []) if head not in heads)
    return load(unseen, device, batch) if unseen else None


def parse_spec(spec):
    """A list of (weight, name, path or None, item without its weight). ValueError if it is malformed."""
    parts = []
    for item in (item.strip() for item in spec.split(",")):
        head, colon, weight = item.rpartition(":") if ":" in item else (item, "", "1")
        name, at, path = head.partition("@")
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r} in {spec!r}: known are {', '.join(sorted(REWARDS))}")
        if at and not path:
            raise ValueError(f"{item!r} has nothing after the @: name a folder or a repository there")
        try:
            weight = float(weight)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"malformed weight in {item!r}: a number follows the colon, as in {head}:0.5")
        parts.append((weight, name, path or None, head))
    if not any(weight for weight, *_ in parts):
        raise ValueError(f"every weight in {spec!r} is 0: there is nothing to optimise")
    heads = [part[3] for part in parts]
    if len(set(heads)) < len(heads):
        raise ValueError(f"a reward comes twice in {spec!r}: add the two weights up instead")
    return parts


def default_prompts(spec):
    """The prompt generator that suits a spec: one that its `ocr` or `geneval` can score, else its first's."""
    names = [name for _, name, _, _ in parse_spec(spec)]
    return next((name for name in ("ocr", "geneval") if name in names), REWARDS[names[0]].prompts)


def tables(reward):
    """{name: details} of the parts of a reward that have any."""
    parts = reward.parts if isinstance(reward, WeightedSum) else [(1, reward)]
    return {part.name: part.details for _, part in parts if part.details}


def normalize(rewards, range):
    """Rewards on [0, 1]: `(r - lo) / (hi - lo)`, clipped."""
    lo, hi = range
    return ((rewards - lo) / (hi - lo)).clamp(0, 1)


@contextlib.contextmanager
def loading(reward, path, subfolder="", advice=""):
    """Inside, whatever goes wrong is an OSError of one line: which reward, which folder, why, what to do."""
    try:
        if not Path(path).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise OSError("no such folder")
        yield
    except Exception as cause:
        if str(cause).startswith(f"reward {reward}: cannot load"):
            raise  # a part of it, which has said so
        place = "/".join(filter(None, (str(path), subfolder)))
        reason = str(cause).strip().partition("\n")[0]
        advice = advice or (f"Plain {reward} downloads its weights from huggingface.co; {reward}@PATH takes "
                            "them from a folder, as the README says")
        raise OSError(f"reward {reward}: cannot load {place} ({reason}). {advice}") from cause


def load_model(kind, path, subfolder="", dtype=torch.float32, **options):
    """A transformers model of class `kind`, in eval mode on the CPU. OSError if any of its tensors is
    missing: transformers would only warn, and leave it random."""
    model, report = kind.from_pretrained(path, subfolder=subfolder, dtype=dtype, output_loading_info=True,
                                         **options)
    missing = sorted(key for key in report["missing_keys"] if "num_batches_tracked" not in key)
    if missing:
        raise OSError(f"it lacks {len(missing)} of the model's tensors, as {missing[0]}")
    return model.eval()


def load_file(path, filename, subfolder=""):
    """The tensors of one file of a folder or repository, read without unpickling any code."""
    from transformers.utils import cached_file
    return torch.load(cached_file(path, filename, subfolder=subfolder), map_location="cpu", weights_only=True)


def load_strictly(model, tensors):
    """`load_state_dict`, and a ValueError of one line where a name or a shape is left over on either side."""
    own = model.state_dict()
    extra, missing = sorted(tensors.keys() - own.keys()), sorted(own.keys() - tensors.keys())
    if extra or missing:
        raise ValueError(f"{len(extra)} of its tensors have no place in the model, as {extra[:1]}; of the "
                         f"model's tensors it lacks {len(missing)}, as {missing[:1]}")
    wrong = [key for key in own if own[key].shape != tensors[key].shape]
    if wrong:
        raise ValueError(f"{wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, "
                         f"the model {tuple(own[wrong[0]].shape)}")
    model.load_state_dict(tensors)
    return model.eval()


def precision(device):
    """bf16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# File size

class Incompressibility(Reward):
    """The size of the picture as a JPEG of quality 95, in kB of 1,000 bytes (Black et al. 2023)."""

    name, range = "incompressibility", (0.0, 200.0)  # at 512 px, a plain picture to a busy one
    sign = 1

    def measure(self, images, prompts, metadata):
        return [self.sign * jpeg_kilobytes(image) for image in images]


class Compressibility(Incompressibility):
    """Minus the size in kB."""

    name, range = "compressibility", (-200.0, 0.0)
    sign = -1


def jpeg_kilobytes(image):
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return file.tell() / 1000


# Text rendering

def quoted(prompt):
    """The text between the prompt's first pair of double quotes; None where there is none."""
    match = re.search(r'"([^"]*)"', prompt)
    return match[1] if match and match[1].strip() else None


def edit_similarity(target, read):
    """1 where `target` is part of what was `read`, else `1 - min(edit distance, n) / n` with n = len(target).

    Case and spaces do not count. The edit distance is Levenshtein's.
    """
    target, read = ("".join(text.casefold().split()) for text in (target, read))
    if target in read:
        return 1.0
    row = list(range(len(read) + 1))  # row[j] = distance from target[:i] to read[:j]
    for i, a in enumerate(target, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(read, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return 1 - min(row[-1], len(target)) / len(target)


class OCR(Reward):
    """How much of the prompt's quoted text PP-OCRv5 reads in the picture, by `edit_similarity`."""

    name, range, prompts = "ocr", (0.0, 1.0), "ocr"

    def __init__(self, path, device):
        """path: a folder or repository with `ocr-det` and `ocr-rec`; by default PP-OCRv5's server models."""
        self.read = TextReader(*(((path, "ocr-det"), (path, "ocr-rec")) if path else
                                 (("PaddlePaddle/PP-OCRv5_server_det_safetensors", ""),
                                  ("PaddlePaddle/PP-OCRv5_server_rec_safetensors", ""))), device)

    def check(self, prompts, metadata, where=None):
        for i, prompt in enumerate(prompts):
            if quoted(prompt) is None:
                place = where[i] if where else metadata[i].get("where", f"prompt {i + 1}")
                raise ValueError(f"{place}: the reward ocr needs the text to draw between double quotes, "
                                 f"and there is none in {prompt!r}")

    def measure(self, images, prompts, metadata):
        self.check(prompts, metadata)
        return [edit_similarity(quoted(prompt), text) for prompt, text in zip(prompts, self.read(images))]


class TextReader:
    """PP-OCR (Cui et al. 2025, arXiv 2507.05595): a detector finds lines of text, a recogniser reads each.

    Called with PIL images it returns a str for each, its lines in reading order. What a picture says does not
    depend on the pictures beside it. Left out: rotated boxes. A line's box is upright, so slanted text is cut
    out slanted and the recogniser has to cope, and text upside down is not turned round.
    """

    BATCH_PIXELS = 2 ** 22  # pixels in one forward pass: sixteen 512 px pictures. Bounds the memory

    def __init__(self, detector, recogniser, device):
        """detector, recogniser: (folder or repository, subfolder)."""
        from transformers import AutoModelForObjectDetection, AutoModelForTextRecognition
        self.device = device
        self.detector, self.find = load_ocr_model(AutoModelForObjectDetection, *detector, device)
        self.recogniser, self.spell = load_ocr_model(AutoModelForTextRecognition, *recogniser, device)
        if not self.spell.get("character_list"):
            raise OSError(f"reward ocr: no character_list in the preprocessor_config.json of {recogniser[0]}")

    @torch.inference_mode()
    def __call__(self, images):
        pixels = [to_pixels(image).to(self.device) for image in images]
        boxes = self.detect(pixels)
        owners = [i for i, found in enumerate(boxes) for _ in found]
        crops = [pixels[i][:, y0:y1, x0:x1] for i, found in enumerate(boxes) for x0, y0, x1, y1 in found]
        texts = [[] for _ in images]
        for i, text in zip(owners, self.recognise(crops)):
            texts[i].append(text)
        return [" ".join(lines) for lines in texts]

    def detect(self, pixels):
        """Pictures (3, H, W) in 0..255 to a list of boxes (x0, y0, x1, y1) each, in reading order."""
        # The statistics come in the order RGB, the network wants BGR: normalise, then turn the channels.
        mean = self.find.get("image_mean", [0.406, 0.456, 0.485])
        std = self.find.get("image_std", [0.225, 0.224, 0.229])
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (mean, std))
        limit = self.find.get("limit_side_len", 960), self.find.get("limit_type", "max")
        sizes = [detector_size(*x.shape[1:], *limit) for x in pixels]
        boxes = [None] * len(pixels)
        for rows in batches(sizes, self.BATCH_PIXELS):
            x = torch.stack([((resize(pixels[i], sizes[i]) / 255 - mean) / std).flip(0) for i in rows])
            maps = self.detector(pixel_values=x).last_hidden_state[:, 0]
            for i, found in zip(rows, find_boxes(maps)):
                found = [whole_pixels(box, maps.shape[1:], pixels[i].shape[1:]) for box in found]
                boxes[i] = reading_order(found)
        return boxes

    def recognise(self, crops):
        """Lines of text (3, h, w) in 0..255 to a list of str."""
        size, pad = (self.spell.get(key, {"height": 48, "width": 320}) for key in ("size", "pad_size"))
        height, widest = size["height"], self.spell.get("max_image_width", 3200)
        mean, std = (torch.tensor(self.spell.get(key, [0.5] * 3), device=self.device).view(3, 1, 1)
                     for key in ("image_mean", "image_std"))
        widths = [min(math.ceil(height * crop.shape[2] / crop.shape[1]), widest) for crop in crops]
        # Padded to whole steps of 32, so that lines share a batch and the padding depends on the line alone.
        padded = [max(pad["width"], math.ceil(width / 32) * 32) for width in widths]
        texts = [None] * len(crops)
        for rows in batches([(height, width) for width in padded], self.BATCH_PIXELS):
            x = torch.zeros(len(rows), 3, height, padded[rows[0]], device=self.device)
            for row, i in enumerate(rows):
                x[row, :, :, :widths[i]] = (resize(crops[i], (height, widths[i])) / 255 - mean) / std
            classes = self.recogniser(pixel_values=x).last_hidden_state
            for i, text in zip(rows, ctc_decode(classes, self.spell["character_list"])):
                texts[i] = text
        return texts


def load_ocr_model(auto, path, subfolder, device):
    """(model in float32 on `device`, its preprocessor_config.json as a dict), or OSError."""
    from transformers.utils import cached_file
    advice = ("Name a folder or a repository that has ocr-det and ocr-rec in it, as in ocr@tiny-sd3; plain "
              "ocr downloads PP-OCRv5 from huggingface.co")
    with loading("ocr", path, subfolder, advice):
        settings = cached_file(path, "preprocessor_config.json", subfolder=subfolder)
        settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if value is not None}
        model = load_model(auto, path, subfolder, use_safetensors=True)
    return model.to(device), settings


def to_pixels(image):
    """PIL image to a float tensor (3, H, W) in 0..255."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float()


def resize(pixels, size):
    """(3, H, W) to (3, *size): bilinear, over all the pixels it shrinks."""
    if pixels.shape[1:] == tuple(size):
        return pixels
    return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def detector_size(height, width, limit=960, limit_type="max"):
    """(height, width) for the detector: the longest side is at most `limit` ("max") or exactly that
    ("resize_long"), or the shortest at least that ("min"); then each goes to the nearest multiple of 32."""
    ratio = {"max": min(limit / max(height, width), 1), "min": max(limit / min(height, width), 1),
             "resize_long": limit / max(height, width)}[limit_type]
    return tuple(max(round(int(side * ratio) / 32) * 32, 32) for side in (height, width))


def whole_pixels(box, old, new):
    """A box in a map of (H, W) = `old` to whole pixels of a picture of `new`: at least one, none outside."""
    (x0, x1), (y0, y1) = ([round(v * new[axis] / old[axis]) for v in ends]
                          for axis, ends in ((1, box[0::2]), (0, box[1::2])))
    x0, y0 = min(max(x0, 0), new[1] - 1), min(max(y0, 0), new[0] - 1)
    return x0, y0, max(min(x1, new[1]), x0 + 1), max(min(y1, new[0]), y0 + 1)


def batches(sizes, pixels):
    """Indices into `sizes`, a list of (height, width), in lists of one size and at most `pixels` in all."""
    groups = {}
    for i, size in enumerate(sizes):
        groups.setdefault(tuple(size), []).append(i)
    for (height, width), rows in sorted(groups.items()):
        step = max(pixels // (height * width), 1)
        yield from (rows[start:start + step] for start in range(0, len(rows), step))


def find_boxes(maps, threshold=0.3, box_threshold=0.6, unclip=1.5, min_side=3):
    """Boxes around the blobs of text maps (B, H, W) in 0..1: a list of (x0, y0, x1, y1) for each, in pixels.

    Differentiable binarisation (Liao et al. 2020, arXiv 1911.08947): maps mark a shrunken core of each line.
    Pixels above `threshold` that touch, diagonals included, are a blob. It counts if their mean is at least
    `box_threshold` and its box, corner to corner, at least `min_side` pixels each way. The box then grows by
    `area * unclip / perimeter` on every side, and may stick out of the map. Simplified from PP-OCR: boxes are
    upright, and the mean is over the blob itself, a better judge of slanted text than its box.
    """
    B, H, W = maps.shape
    mask = maps > threshold
    b, y, x = mask.nonzero(as_tuple=True)
    if not len(b):
        return [[] for _ in range(B)]
    blobs, blob = connected(mask).unique(return_inverse=True)

    def over_blobs(values, how):
        start = torch.zeros(len(blobs), dtype=values.dtype, device=maps.device)
        return start.scatter_reduce(0, blob, values, how, include_self=False)

    scores = over_blobs(maps[mask].float(), "mean")
    x0, y0, x1, y1 = (over_blobs(v.float(), how) for how in ("amin", "amax") for v in (x, y))
    w, h = x1 - x0, y1 - y0
    grow = w * h * unclip / (2 * (w + h)).clamp(min=1)
    keep = (scores >= box_threshold) & (torch.minimum(w, h) >= min_side)
    corners = torch.stack([x0 - grow, y0 - grow, x1 + grow, y1 + grow], 1)[keep].tolist()
    boxes = [[] for _ in range(B)]
    for i, box in zip(b[blobs[keep]].tolist(), corners):
        boxes[i].append(tuple(box))
    return boxes


def connected(mask):
    """Connected components (8 neighbours) of masks (B, H, W): a label for each pixel set, in `mask.nonzero()`
    order. The label is the index, in that order, of the component's last pixel."""
    n = int(mask.sum())
    number = torch.full((mask.shape[0], mask.shape[1] + 2, mask.shape[2] + 2), -1, device=mask.device)
    inner = number[:, 1:-1, 1:-1]
    inner[mask] = labels = torch.arange(n, device=mask.device)
    pairs = []
    for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):  # the other four neighbours see it the other way round
        beside = number[:, 1 + dy:1 + dy + mask.shape[1], 1 + dx:1 + dx + mask.shape[2]]
        both = (inner >= 0) & (beside >= 0)
        pairs.append(torch.stack([inner[both], beside[both]]))
    a, b = torch.cat(pairs, 1)
    while True:
        apart = labels[a] != labels[b]
        if not apart.any():
            return labels
        # Components that touch: the smaller name learns the larger one, then every pixel follows its label's
        # labels to the end. What agrees stays in agreement, so few rounds are needed and each is shorter.
        a, b = a[apart], b[apart]
        one, other = labels[a], labels[b]
        labels = labels.scatter_reduce(0, torch.minimum(one, other), torch.maximum(one, other), "amax")
        while not torch.equal(labels, labels[labels]):
            labels = labels[labels]


def reading_order(boxes):
    """Boxes (x0, y0, x1, y1) from top to bottom, those on one line from left to right.

    A box is on the line of the box above it when its middle is higher than that line's first box reaches.
    """
    lines = []
    for box in sorted(boxes, key=lambda box: box[1] + box[3]):
        if lines and (box[1] + box[3]) / 2 < lines[-1][0][3]:
            lines[-1].append(box)
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line)]


def ctc_decode(scores, characters):
    """Class scores (B, T, C) to B strings: best class a step, repeats merged, class 0 (no letter) dropped."""
    best = scores.argmax(-1)
    new = torch.cat([torch.ones_like(best[:, :1], dtype=torch.bool), best[:, 1:] != best[:, :-1]], 1)
    best = torch.where(new, best, 0).tolist()
    return ["".join(characters[i] for i in row if i) for row in best]


# The CLIP family

class CLIP:
    """A CLIP model (Radford et al. 2021): pictures and texts to unit vectors (n, d), float32 on its device.

    Pictures go through the checkpoint's own processor: shortest side to 224, bicubic, the centre cut out,
    OpenAI's mean and std. Texts: at most 77 tokens, the rest is cut off.
    """

    def __init__(self, model, path, subfolder=""):
        """model: a CLIPModel on its device. path, subfolder: where its tokenizer and processor are."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder)
        self.processor = CLIPImageProcessorPil.from_pretrained(path, subfolder=subfolder)

    def images(self, images):
        x = clip_pixels(self.processor, images).to(self.model.device, self.model.dtype)
        return F.normalize(self.model.get_image_features(pixel_values=x).pooler_output.float(), dim=-1)

    def texts(self, texts):
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length,
                                return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)


def clip_pixels(processor, images):
    """Pictures of any size and mode to (n, 3, H, W), by a processor that cuts out their centre.

    A picture longer than eight times its width loses its ends first: the centre keeps nothing of them, and
    scaled up by its shortest side, a sliver of one pixel would not fit in memory.
    """
    def trimmed(image):
        limit = 8 * min(image.size)
        size = tuple(min(side, limit) for side in image.size)
        left, top = ((whole - part) // 2 for whole, part in zip(image.size, size))
        return image.convert("RGB").crop((left, top, left + size[0], top + size[1]))

    return processor([trimmed(image) for image in images], return_tensors="pt").pixel_values


class CLIPScore(Reward):
    """The cosine of picture and prompt in OpenCLIP's ViT-H-14 (Hessel et al. 2021, arXiv 2104.08718, without
    their factor and cut at 0). The base of the family: the others load another model or end it otherwise."""

    name, range, prompts = "clipscore", (0.0, 0.4), "geneval"
    repository, scale = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 1.0

    def __init__(self, path, device):
        """path: a folder or repository with a CLIPModel, its tokenizer and its processor."""
        with loading(self.name, path or self.repository):
            self.clip = self.load_clip(path, device)

    def load_clip(self, path, device):
        from transformers import CLIPModel
        model = load_model(CLIPModel, path or self.repository)
        return CLIP(model.to(device, precision(device)), path or self.repository)

    def measure(self, images, prompts, metadata):
        texts = list(dict.fromkeys(prompts))  # a group of images shares its prompt
        rows = [texts.index(prompt) for prompt in prompts]
        texts, images = self.in_batches(self.clip.texts, texts), self.in_batches(self.clip.images, images)
        return self.scale * (images * texts[rows]).sum(-1)


class PickScore(CLIPScore):
    """Human preference (Kirstain et al. 2023, arXiv 2305.01569): ViT-H-14 fine-tuned on Pick-a-Pic, its
    cosine times its temperature, about 100. (Some public codes divide by 26.) Inputs as for ViT-H-14, whose
    processor it takes: github.com/yuvalkirstain/PickScore."""

    name, range = "pickscore", (16.0, 26.0)

    def load_clip(self, path, device):
        from transformers import CLIPModel
        with loading(self.name, path or "yuvalkirstain/PickScore_v1"):
            model = load_model(CLIPModel, path or "yuvalkirstain/PickScore_v1")
        self.scale = model.logit_scale.exp().item()  # read before bf16 rounds it
        return CLIP(model.to(device, precision(device)), path or self.repository)


class HPSv2(CLIPScore):
    """Human preference score v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine in OpenCLIP's ViT-H-14,
    fine-tuned on HPD v2.

    Inputs as in github.com/tgxs002/HPSv2: longest side to 224, bicubic, black bars to a square, OpenAI's mean
    and std, 77 tokens. For square pictures this is CLIP's own way.
    """

    name, range = "hpsv2", (0.1, 0.4)
    weights = "HPS_v2.1_compressed.pt"
    architecture = dict(projection_dim=1024, text_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        hidden_act="gelu", eos_token_id=49407), vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
        image_size=224, patch_size=14, hidden_act="gelu"))

    def load_clip(self, path, device):
        """path: a folder with HPS_v2.1_compressed.pt and ViT-H-14's tokenizer and processor."""
        from transformers import CLIPConfig, CLIPModel
        with loading(self.name, path or "xswu/HPSv2", self.weights):
            with device:
                model = CLIPModel(CLIPConfig(**self.architecture))
            load_strictly(model, from_openclip(load_file(path or "xswu/HPSv2", self.weights)["state_dict"]))
        return CLIP(model.to(precision(device)), path or self.repository)

    def measure(self, images, prompts, metadata):
        side = self.architecture["vision_config"]["image_size"]
        images = [ImageOps.pad(image.convert("RGB"), (side, side), Image.BICUBIC) for image in images]
        return super().measure(images, prompts, metadata)


OPENCLIP_NAMES = (  # OpenCLIP's names to CLIPModel's, applied in order
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."), (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."))


def rename(tensors, names):
    """The dict with `names`, pairs (pattern, replacement), applied to its keys. ValueError if two collide."""
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        if key in renamed:
            raise ValueError(f"two tensors are named {key}")
        renamed[key] = tensor
    return renamed


def from_openclip(tensors):
    """An OpenCLIP state dict under the names of transformers' CLIPModel.

    OpenCLIP keeps an attention's query, key and value in one matrix, and its two projections transposed.
    """
    tensors = rename(tensors, OPENCLIP_NAMES)
    for key in [key for key in tensors if ".in_proj_" in key]:
        layer, kind = key.split(".in_proj_")
        for part, rows in zip("qkv", tensors.pop(key).chunk(3)):
            tensors[f"{layer}.{part}_proj.{kind}"] = rows.contiguous()
    for key in {"text_projection.weight", "visual_projection.weight"} & tensors.keys():
        tensors[key] = tensors[key].T.contiguous()
    return tensors


class Aesthetic(CLIPScore):
    """LAION's aesthetic predictor v2, DDPO's aesthetic quality: a rating of 1 to 10 from CLIP ViT-L/14's unit
    image vector, by five linear layers with nothing in between. The prompt plays no part.
    (github.com/christophschuhmann/improved-aesthetic-predictor)."""

    name, range, prompts = "aesthetic", (1.0, 10.0), "animals"
    repository, head = "openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor"

    def load_clip(self, path, device):
        """path: a folder with `clip`, a CLIPModel's folder, and `head`, which has aesthetic-model.pth."""
        from transformers import CLIPModel
        folder, clip, head = (path, "clip", "head") if path else (self.repository, "", "")
        with loading(self.name, folder, clip):
            model = load_model(CLIPModel, folder, clip)
        self.mlp = linear_head(model.config.projection_dim)
        with loading(self.name, path or self.head, f"{head}/aesthetic-model.pth".lstrip("/")):
            tensors = load_file(path or self.head, "aesthetic-model.pth", head)
            load_strictly(self.mlp, rename(tensors, [(r"^layers\.", "")])).to(device)
        return CLIP(model.to(device, precision(device)), folder, clip)

    def measure(self, images, prompts, metadata):
        return self.mlp(self.in_batches(self.clip.images, images)).squeeze(-1)


def linear_head(width):
    """The head of LAION's predictor and of ImageReward, with its names: (n, width) to (n, 1)."""
    sizes, drop = [width, 1024, 128, 64, 16, 1], nn.Identity
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(layers[0], drop(), layers[1], drop(), layers[2], drop(), layers[3], layers[4])


# ImageReward

class ImageReward(Reward):
    """Human preference (Xu et al. 2023, arXiv 2304.05977): BLIP's text encoder reads the prompt with an eye
    on the picture, and a head turns its first token into a score, standardised by the authors' constants.

    Inputs as in github.com/THUDM/ImageReward: shortest side to 224, bicubic, the centre cut out, OpenAI's
    mean and std; the prompt in BERT's lower-case tokens, padded or cut to 35.
    """

    name, range, prompts = "imagereward", (-2.0, 2.0), "geneval"
    mean, std, length = 0.16717362830052426, 1.0333394966054072, 35
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=224, patch_size=16, layer_norm_eps=1e-6)
    text = dict(hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, vocab_size=30524)

    def __init__(self, path, device):
        """path: a folder with ImageReward.pt and the tokenizer of bert-base-uncased."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil
        side, source = self.vision["image_size"], path or "THUDM/ImageReward"
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side},
                                               crop_size={"height": side, "width": side})
        with loading(self.name, path or "google-bert/bert-base-uncased"):
            self.tokenizer = AutoTokenizer.from_pretrained(path or "google-bert/bert-base-uncased")
        with loading(self.name, source, "ImageReward.pt"):
            with device:
                self.model = self.build()
            load_strictly(self.model, from_imagereward(load_file(source, "ImageReward.pt")))
        self.model["vision"].to(precision(device))
        self.model["text"].to(precision(device))

    @classmethod
    def build(cls):
        """The three parts, with random weights."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        return nn.ModuleDict({"vision": BlipVisionModel(BlipVisionConfig(**cls.vision)),
                              "text": BlipTextModel(BlipTextConfig(**cls.text), add_pooling_layer=False),
                              "head": linear_head(cls.text["hidden_size"])})

    def measure(self, images, prompts, metadata):
        return self.in_batches(self.measure_batch, images, prompts)

    def measure_batch(self, images, prompts):
        vision, text = self.model["vision"], self.model["text"]
        x = clip_pixels(self.processor, images).to(vision.device, vision.dtype)
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt").to(text.device)
        seen = vision(pixel_values=x).last_hidden_state
        read = text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return (self.model["head"](read[:, 0].float()).squeeze(-1) - self.mean) / self.std


IMAGEREWARD_NAMES = (
    (r"^blip\.text_encoder\.", "text."), (r"^mlp\.layers\.", "head."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."), (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."))
# A buffer of position numbers, and BLIP's contrastive heads, of which the reward makes no use.
IMAGEREWARD_UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.weight",
                      "blip.vision_proj.bias", "blip.text_proj.weight", "blip.text_proj.bias")


def from_imagereward(tensors):
    """ImageReward's state dict (BLIP's ViT and med encoder) under the names of `ImageReward.build`."""
    return rename({key: tensor for key, tensor in tensors.items() if key not in IMAGEREWARD_UNUSED},
                  IMAGEREWARD_NAMES)


# Vision-language models

class Chat(Reward):
    """Base: a vision-language model that looks at a picture, reads a question and answers it greedily.

    `template` is the conversation in the form the model was trained on; its {image} becomes one image token
    for each vector that the picture is seen as. Answers end after `new_tokens`.
    """

    template, image_token, new_tokens = "{image}{question}", "<image>", 64

    def load_chat(self, model, processor, path, subfolder, device):
        """model, processor: classes of transformers."""
        from transformers import AutoTokenizer
        with loading(self.name, path, subfolder):
            self.tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder)
            self.processor = processor.from_pretrained(path, subfolder=subfolder)
            self.model = load_model(model, path, subfolder, precision(device)).to(device)

    def see(self, images):
        """(the model's inputs for the pictures, the number of image tokens of each)."""
        raise NotImplementedError

    def ask(self, images, questions):
        """A str for each picture and question. Questions are padded on the left, where it changes nothing."""
        inputs, counts = self.see([image.convert("RGB") for image in images])
        texts = [self.template.format(image=self.image_token * count, question=question)
                 for count, question in zip(counts, questions)]
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        if "image_grid_thw" in inputs:  # Qwen wants to be told which tokens are a picture
            tokens["mm_token_type_ids"] = (tokens.input_ids == self.model.config.image_token_id).int()
        tokens.pop("token_type_ids", None)
        inputs = {key: x.to(self.model.device) for key, x in {**tokens, **inputs}.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        answers = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.new_tokens)
        answers = answers[:, inputs["input_ids"].shape[1]:]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


class VLM(Chat):
    """DDPO's prompt alignment (Black et al. 2023): LLaVA says what it sees, and BERTScore's recall says how
    much of the prompt is in that.

    As in github.com/kvablack/ddpo-pytorch and LLaVA-server, the description is the candidate and
    `The image contains {prompt}` the reference: every word of the prompt looks for itself in the description.
    Theirs is an older LLaVA, fed JPEGs of quality 80; this is LLaVA 1.5, fed the picture: shortest side to
    336, bicubic, the centre cut out, OpenAI's mean and std. Answers have at most 64 tokens, as there.
    """

    name, range, prompts = "vlm", (0.0, 1.0), "activities"
    template = "USER: {image}\n{question} ASSISTANT:"
    question = "Answer concisely: what is going on in this image?"
    layer = 40  # of 48: the one that agrees best with people, by BERTScore's table for this model

    def __init__(self, path, device):
        """path: a folder with `llava`, and `deberta`, each with its tokenizer."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil, DebertaModel
        from transformers import LlavaForConditionalGeneration
        llava = (path, "llava") if path else ("llava-hf/llava-1.5-7b-hf", "")
        folder, part = (path, "deberta") if path else ("microsoft/deberta-xlarge-mnli", "")
        self.load_chat(LlavaForConditionalGeneration, CLIPImageProcessorPil, *llava, device)
        with loading(self.name, folder, part):
            self.words = AutoTokenizer.from_pretrained(folder, subfolder=part)
            self.bert = load_model(DebertaModel, folder, part, num_hidden_layers=self.layer)
            self.bert.to(device, precision(device))

    def see(self, images):
        x, config = clip_pixels(self.processor, images), self.model.config
        patches = x.shape[2] * x.shape[3] // config.vision_config.patch_size ** 2
        first = config.vision_feature_select_strategy == "full"  # the default drops the class token
        return {"pixel_values": x}, [patches + first] * len(images)

    def measure(self, images, prompts, metadata):
        return self.in_batches(self.measure_batch, images, prompts)

    def measure_batch(self, images, prompts):
        said = self.token_vectors(self.ask(images, [self.question] * len(images)))
        asked = self.token_vectors([f"The image contains {prompt}" for prompt in prompts])
        return torch.tensor([bertscore_recall(*pair) for pair in zip(said, asked)])

    def token_vectors(self, texts):
        """Layer 40's vectors of the tokens of each text, special ones left out: a list of (n, d), float32."""
        tokens = self.words(texts, padding=True, truncation=True, max_length=512, return_tensors="pt",
                            return_special_tokens_mask=True).to(self.bert.device)
        own = tokens.pop("special_tokens_mask") == 0
        vectors = self.bert(**tokens).last_hidden_state.float()
        return [x[mask] for x, mask in zip(vectors, own)]


def bertscore_recall(candidate, reference):
    """The mean, over the reference's tokens, of the best cosine with a candidate's token (Zhang et al. 2020,
    arXiv 1904.09675). candidate (n, d), reference (m, d). A text without tokens recalls nothing: 0.

    Special tokens are left out on both sides. (The bert_score package gives them no weight in the mean, but
    lets a word match them.) No idf weights, no rescaling by a baseline, as DDPO has it.
    """
    if not len(candidate) or not len(reference):
        return 0.0
    cosines = F.normalize(reference, dim=-1) @ F.normalize(candidate, dim=-1).T
    return cosines.amax(1).mean().item()


class UnifiedReward(Chat):
    """A vision-language model's mark for alignment and quality, 1 to 5 (Wang et al. 2025, arXiv 2503.05236).

    The question is the published one, as github.com/yifan123/flow_grpo puts it; the picture is resized to
    512 x 512 as there, whatever its shape. The mark is what follows `Final Score:` in the reply.
    """

    name, range, prompts = "unifiedreward", (1.0, 5.0), "geneval"
    template = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"  # Qwen's
                "<|vision_start|>{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")
    image_token, new_tokens, side = "<|image_pad|>", 512, 512
    question = """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate this \
image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the \
accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, \
color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

    def __init__(self, path, device):
        """path: a folder or repository with a Qwen2.5-VL."""
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
        self.load_chat(Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil,
                       path or "CodeGoat24/UnifiedReward-qwen-7b", "", device)

    def see(self, images):
        images = [image.resize((self.side, self.side), Image.BICUBIC) for image in images]
        inputs = self.processor(images, return_tensors="pt")
        return inputs, (inputs["image_grid_thw"].prod(1) // self.processor.merge_size ** 2).tolist()

    def measure(self, images, prompts, metadata):
        questions = [self.question.format(prompt=prompt) for prompt in prompts]
        return [final_score(reply) for reply in self.in_batches(self.ask, images, questions)]


def final_score(reply):
    """The number after the last `Final Score:`. ValueError, with the reply, unless it is in 1 to 5."""
    marks = re.findall(r"Final Score:\W*(\d+(?:\.\d+)?)", reply)
    if not marks or not 1 <= float(marks[-1]) <= 5:
        raise ValueError(f"no mark of 1 to 5 after 'Final Score:' in the reply {reply!r}")
    return float(marks[-1])


# GenEval

CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant,
bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave,
oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace(
    "\n", " ").split(", ")
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = "left of", "right of", "above", "below"
TASKS = "single_object", "two_object", "counting", "colors", "position", "color_attr"


@dataclass
class Found:
    """An object that was detected: its score in 0..1, its box (x0, y0, x1, y1) in pixels, its mask (H, W)
    and, where the prompt asks for one, its color."""

    score: float
    box: tuple
    mask: torch.Tensor = None
    color: str = None


class GenEval(Reward):
    """Are the objects, counts, colors and positions as asked? (Ghosh et al. 2023, arXiv 2310.11513.)

    The reward is `partial_credit`, for training. `details` has the benchmark's table: for each task the share
    of pictures that are `as_asked`, and `overall`, the mean over tasks. As in github.com/djghosh13/geneval,
    Mask2Former finds objects of COCO's 80 classes, those scoring above 0.3 (0.9 where they are counted), at
    most the 16 best of a class; and CLIP ViT-L/14 names the color of an object from its box, with all around
    the object in grey. Detector inputs as in mmdet: shortest side to 800 but the longest to at most 1333,
    bilinear, ImageNet's mean and std. (The checkpoint's own processor works at 384 x 384.) Simplified: sides
    go to multiples of 32 where mmdet pads them.
    """

    name, range, prompts = "geneval", (0.0, 1.0), "geneval"
    threshold, counting_threshold, most = 0.3, 0.9, 16
    shortest, longest = 800, 1333

    def __init__(self, path, device):
        """path: a folder with `detector`, a Mask2Former for COCO's instances, and `clip`, a CLIPModel."""
        from transformers import CLIPModel
        self.device, self.names = device, {}
        folder, part = (path, "detector") if path else ("facebook/mask2former-swin-small-coco-instance", "")
        with loading(self.name, folder, part):
            self.detector = load_model(detector_class(), folder, part).to(device, precision(device))
            if self.detector.config.num_labels != len(CLASSES):
                raise OSError(f"it detects {self.detector.config.num_labels} classes, not COCO's 80")
        folder, part = (path, "clip") if path else ("openai/clip-vit-large-patch14", "")
        with loading(self.name, folder, part):
            model = load_model(CLIPModel, folder, part).to(device, precision(device))
            self.clip = CLIP(model, folder, part)

    def check(self, prompts, metadata, where=None):
        for i, (prompt, entry) in enumerate(zip(prompts, metadata)):
            wrong = malformed(entry)
            if wrong:
                place = where[i] if where else entry.get("where", f"prompt {i + 1}")
                raise ValueError(f"{place}: the reward geneval needs GenEval's metadata with the prompt "
                                 f"{prompt!r}, and {wrong}. Its own prompts (--prompts geneval) have it")

    def measure(self, images, prompts, metadata):
        self.check(prompts, metadata)
        everything = [kept(objects, entry["tag"]) for objects, entry in zip(self.detect(images), metadata)]
        self.name_colors(images, everything, metadata)
        verdicts = {task: [] for task in TASKS}
        for objects, entry in zip(everything, metadata):
            verdicts[entry["tag"]].append(as_asked(objects, entry))
        means = {task: sum(own) / len(own) for task, own in verdicts.items() if own}
        self.details = {**means, "overall": sum(means.values()) / len(means)}
        return [partial_credit(objects, entry) for objects, entry in zip(everything, metadata)]

    @torch.no_grad()
    def detect(self, images):
        """A dict {class: [Found, best first]} for each picture, of all that score above the threshold."""
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1)
                     for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        pixels = [to_pixels(image) for image in images]
        sizes = [instance_size(*x.shape[1:], self.shortest, self.longest) for x in pixels]
        found = [None] * len(images)
        for rows in batches(sizes, self.batch * self.shortest ** 2):
            x = torch.stack([(resize(pixels[i].to(self.device), sizes[i]) / 255 - mean) / std for i in rows])
            output = self.detector(pixel_values=x.to(self.detector.dtype))
            for i, *logits in zip(rows, output.class_queries_logits, output.masks_queries_logits):
                found[i] = instances(*logits, pixels[i].shape[1:], self.threshold)
        return found

    def name_colors(self, images, everything, metadata):
        """Set the color of the objects whose prompt asks for one."""
        jobs = [(image, want["class"], found) for image, objects, entry in zip(images, everything, metadata)
                for want in entry["include"] if "color" in want for found in objects.get(want["class"], [])]
        if not jobs:
            return
        vectors = self.in_batches(self.clip.images, [cut_out(image, found) for image, _, found in jobs])
        for (_, name, found), vector in zip(jobs, vectors):
            found.color = COLORS[int((self.color_vectors(name) @ vector).argmax())]

    def color_vectors(self, name):
        """(10, d): CLIP's vector for each color of a class, the mean of three ways to put it."""
        if name not in self.names:
            texts = [f"a photo of a {put}" for color in COLORS
                     for put in (f"{color} {name}", f"{color}-colored {name}", f"{color} object")]
            self.names[name] = F.normalize(self.clip.texts(texts).view(len(COLORS), 3, -1).mean(1), dim=-1)
        return self.names[name]


def detector_class():
    """Mask2FormerForUniversalSegmentation without its training loss, whose constructor asks for scipy."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerModel, Mask2FormerPreTrainedModel

    class Detector(Mask2FormerForUniversalSegmentation):
        _keys_to_ignore_on_load_unexpected = [r"^criterion\."]

        def __init__(self, config):
            Mask2FormerPreTrainedModel.__init__(self, config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

    return Detector


def instance_size(height, width, shortest, longest):
    """(height, width) for the detector: as large as both limits allow, then each to a multiple of 32."""
    ratio = min(shortest / min(height, width), longest / max(height, width))
    return tuple(max(round(side * ratio / 32) * 32, 32) for side in (height, width))


def instances(class_logits, mask_logits, size, threshold):
    """Mask2Former's output for one picture to {class: [Found, best first]}.

    class_logits (Q, 81), the last for no object; mask_logits (Q, h, w); size (height, width) of the picture.
    A query may stand for several classes. The score is the class's probability times the mean of the mask's
    where that is above a half (Cheng et al. 2022, arXiv 2112.01527).
    """
    scores = class_logits.float().softmax(-1)[:, :-1]
    scores, index = scores.flatten().topk(len(scores))
    index, scores = index[scores > threshold], scores[scores > threshold]  # a mask can only lower them
    objects = {}
    if not len(index):
        return objects
    queries, labels = index // (class_logits.shape[1] - 1), index % (class_logits.shape[1] - 1)
    masks = F.interpolate(mask_logits[None, queries].float(), size, mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    areas = inside.flatten(1).sum(1)
    scores = scores * (masks.sigmoid() * inside).flatten(1).sum(1) / areas.clamp(min=1)
    for i in scores.argsort(descending=True).tolist():
        if scores[i] > threshold and areas[i]:
            (y0, y1), (x0, x1) = (ends(inside[i].any(axis)) for axis in (1, 0))
            found = Found(scores[i].item(), (x0, y0, x1, y1), inside[i].cpu())
            objects.setdefault(CLASSES[labels[i]], []).append(found)
    return objects


def ends(line):
    """Where a row of bools is first true, and one past where it last is."""
    where = line.nonzero()
    return int(where[0]), int(where[-1]) + 1


def kept(objects, tag):
    """The objects that count: surer ones where they are counted, at most 16 of a class."""
    least = GenEval.counting_threshold if tag == "counting" else GenEval.threshold
    objects = {name: [found for found in own if found.score > least][:GenEval.most]
               for name, own in objects.items()}
    return {name: own for name, own in objects.items() if own}


def cut_out(image, found):
    """The object's box out of the picture, all that is not the object in grey."""
    image, mask = image.convert("RGB"), Image.fromarray(found.mask.byte().mul(255).numpy())
    return Image.composite(image, Image.new("RGB", image.size, "#999"), mask).crop(found.box)


def relations(a, b):
    """Which of RELATIONS the box a is in to the box b: none, one or two, judged by their centres.

    Along each axis, a tenth of the sum of the two sides does not count. What is left of the offset has to be
    more than half of the whole distance.
    """
    dead = [0.1 * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    left = [math.copysign(max(abs(o) - d, 0), o) for o, d in zip(offset, dead)]
    if max(map(abs, left)) < 1e-3:
        return set()
    dx, dy = (x / math.hypot(*offset) for x in left)
    holds = dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5
    return {name for name, true in zip(RELATIONS, holds) if true}


def as_asked(objects, entry):
    """The benchmark's verdict: all that is to be included is there, and nothing that is to be excluded.

    objects {class: [Found, best first]}; entry: GenEval's metadata. Of each class to include, the best
    `count` objects are judged: enough of them, all of the color, each in its relation to each of a group.
    """
    groups = []
    for want in entry["include"]:
        found = objects.get(want["class"], [])[:want["count"]]
        met = len(found) == want["count"] and all(x.color == want.get("color", x.color) for x in found)
        groups.append(found if met and placed(found, want, groups) else None)
    excluded = any(len(objects.get(want["class"], [])) >= want["count"] for want in entry.get("exclude", []))
    return None not in groups and not excluded


def placed(found, want, groups):
    """Whether each object is where `want` has it, if anywhere, of an earlier group that was as asked."""
    if "position" not in want:
        return True
    relation, target = want["position"]
    return groups[target] is not None and all(relation in relations(a.box, b.box)
                                              for a in found for b in groups[target])


def partial_credit(objects, entry):
    """The score for training, at most 1: the mean over what is asked (Flow-GRPO, Liu et al. 2025).

    A count n gets 1 - |n - found| / n, below 0 for more than twice as many; a color the same with the objects
    of that color, and a position 1 or 0, both 0 where the count is wrong. All objects of a class are judged,
    so `exclude` adds nothing. (As in github.com/yifan123/reward-server, but for its 1 after the 0 of a wrong
    position.)
    """
    credit, groups = [], []
    for want in entry["include"]:
        found, n = objects.get(want["class"], []), want["count"]
        credit.append(1 - abs(n - len(found)) / n)
        met = len(found) == n
        if "color" in want:
            right = sum(x.color == want["color"] for x in found)
            credit.append(1 - abs(n - right) / n if met else 0.0)
            met = met and right == n
        if "position" in want:
            met = met and placed(found, want, groups)
            credit.append(float(met))
        groups.append(found if met else None)
    return sum(credit) / len(credit)


def malformed(entry):
    """What is wrong with a prompt's GenEval metadata, in a few words; None where all is well."""
    if entry.get("tag") not in TASKS:
        return f"its tag is {entry.get('tag')!r}, not {', '.join(TASKS[:-1])} or {TASKS[-1]}"
    include, exclude = entry.get("include"), entry.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        return "its include is no list of objects"
    for i, want in enumerate(include + exclude):
        if not isinstance(want, dict) or want.get("class") not in CLASSES:
            return f"{want!r} names no class of COCO's 80"
        if not isinstance(want.get("count"), int) or want["count"] < 1:
            return f"{want!r} has no count"
        if want.get("color", "red") not in COLORS:
            return f"{want['color']!r} is none of its colors, {', '.join(COLORS)}"
        position = want.get("position", ["above", 0] if i else None)
        if position and (len(position) != 2 or position[0] not in RELATIONS or position[1] not in range(i)):
            return f"{position!r} is no position relative to an object before it"


REWARDS = {reward.name: reward for reward in (
    OCR, Compressibility, Incompressibility, CLIPScore, PickScore, HPSv2, Aesthetic, ImageReward, VLM,
    UnifiedReward, GenEval)}


# Prompts

def held_out(text):
    """True for the eighth of all texts kept for evaluation. A checksum decides: the split needs no list."""
    return zlib.crc32(text.encode()) % 8 == 0


def prompts(source, split, seed):
    """Pairs (prompt, metadata) from a generator (a name of `PROMPTS`) or from a .txt or .jsonl file.

    split "train": endless, decided by `seed`. split "eval": a list of at most EVAL_SIZE, whatever the seed.
    No evaluation text (`ocr`), word (`signs`), animal (`animals`) or prompt (others) is ever trained on.
    metadata["where"] says where a prompt came from. ValueError, with file and line, for a bad file.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"the split is train or eval, not {split!r}")
    if Path(source).suffix or source not in PROMPTS:
        return file_prompts(source, split, seed)
    pairs = generated(source, split, seed if split == "train" else 0)
    if split == "train":
        return pairs
    # Generators with few evaluation prompts repeat themselves: stop looking after a while.
    distinct = dict(islice(pairs, 4 * EVAL_SIZE))
    return list(islice(distinct.items(), EVAL_SIZE))


def generated(source, split, seed):
    """Endless pairs (prompt, metadata) of a generator, which yields prompts, or pairs itself."""
    for item in PROMPTS[source](split, random.Random(seed)):
        prompt, metadata = (item, {}) if isinstance(item, str) else item
        yield prompt, {**metadata, "where": f"prompt generator {source}"}


def check(reward, source):
    """ValueError, with file and line, if `reward` cannot score some prompt of a file or of a generator."""
    pairs = prompts(source, "eval", 0) if source in PROMPTS else read_prompt_file(source)
    reward.check(*zip(*pairs))


def file_prompts(path, split, seed):
    """`prompts` from a .txt file (a prompt a line) or a .jsonl file (an object a line)."""
    pairs = read_prompt_file(path)
    pairs = [pair for pair in pairs if held_out(pair[0]) == (split == "eval")]
    if not pairs:
        raise ValueError(f"{path} has no prompt for the split {split!r}: a checksum of its text keeps about "
                         "one prompt in eight for evaluation, so give it a few dozen different prompts")
    if split == "eval":
        return random.Random(0).sample(pairs, len(pairs))[:EVAL_SIZE]
    return shuffled_for_ever(pairs, random.Random(seed))


def shuffled_for_ever(items, rng):
    while True:
        yield from rng.sample(items, len(items))


def read_prompt_file(path):
    """All pairs (prompt, metadata) of a file. ValueError names the file, and the line where there is one."""
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts {str(path)!r}: neither {', '.join(PROMPTS)} nor a .txt or .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise ValueError(f"cannot read the prompts in {path}: {reason}") from cause
    pairs = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        entry = {"prompt": line}
        if path.suffix == ".jsonl" and line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as cause:
                raise ValueError(f"{where}: not JSON ({cause.msg}, column {cause.colno})") from cause
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise ValueError(f'{where}: needs an object with a "prompt", as in {{"prompt": "a cat"}}')
        prompt = entry.pop("prompt").strip()
        if not prompt:
            raise ValueError(f"{where}: the prompt is blank")
        pairs.append((prompt, {**entry, "where": where}))
    if not pairs:
        raise ValueError(f"{path} holds no prompt")
    return pairs


CONSONANTS, VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
PATTERNS = ("CVC", "CVVC", "CVCV", "CCVC", "VCVC", "CVCC")
SIGN_COLORS = ("red", "green", "blue", "black", "brown", "teal")


def sign_prompts(split, rng):
    """What tiny-sd3 draws: words of three or four letters, mostly pronounceable, `"moon" on a blue sign`."""
    while True:
        word = "".join(rng.choice(CONSONANTS if kind == "C" else VOWELS) for kind in rng.choice(PATTERNS))
        color = rng.choice(SIGN_COLORS)
        if held_out(word) == (split == "eval"):
            yield f'"{word}" on a {color} sign'


SCENES = """
A wooden sign outside a small bakery that reads
A neon sign in a rainy street at night that says
A ceramic mug on a writing desk with the words
A vintage travel poster of a mountain lake with the title
A white T-shirt on a hanger with the printed words
A chalkboard in front of a cafe on which is written
A birthday cake on a kitchen table with the icing text
A graffiti mural on a brick wall that spells
A road sign beside a desert highway that reads
A paperback novel on a park bench with the title
A shop window in winter with gold lettering that says
A tote bag on a beach towel with the printed slogan
A cardboard sign in the hands of a smiling robot that says
A brass plaque on an old oak door engraved with
A billboard above a busy crossing that says
A fortune cookie slip on a plate that reads
A cinema marquee at dusk that announces
A postage stamp with a sailing ship and the text
A glass jar on a pantry shelf with a label that reads
A hot air balloon over a valley with a banner that says
A theatre ticket on red velvet printed with
A lighthouse wall painted with large letters that say
A street food truck at a fair with the name
A baseball cap on a fence post embroidered with""".strip().splitlines()
STYLES = ("", "", "", ", a photograph", ", soft morning light", ", an oil painting", ", a watercolour",
          ", close-up", ", studio lighting", ", a flat illustration")
ADJECTIVES = """fresh warm quiet golden happy little hidden silver wild gentle brave early open bright
simple honest lucky royal northern summer winter secret purple sweet hungry clever ancient electric""".split()
NOUNS = """bread garden river coffee market music forest kitchen harbor morning honey island library
lemon mountain thunder kingdom story pepper window dragon bicycle castle planet orange travel picture
village butter winter sunset pocket rocket cotton engine ocean tiger violin museum bridge school theater
diamond journey candle feather chocolate station mirror number paper shadow season silence table ticket
tomorrow valley weather whisper wonder""".split()
VERBS = "follow explore remember protect discover welcome trust believe share celebrate enjoy imagine".split()
PHRASES = ("open", "closed", "hello", "thank you", "good morning", "keep out", "do not enter", "for sale",
           "stay curious", "see you soon", "dream big", "just breathe", "wet paint", "no parking",
           "slow down", "happy new year", "home sweet home", "mind the gap", "please knock", "sold out",
           "welcome home", "never give up", "one more time", "exit", "work in progress")


def text_prompts(split, rng):
    """Things that say one to three English words: `A neon sign in a rainy street that says "Dream Big"`."""
    adjective, noun, verb = (lambda words=words: rng.choice(words) for words in (ADJECTIVES, NOUNS, VERBS))
    patterns = (noun, lambda: rng.choice(PHRASES), lambda: f"{adjective()} {noun()}",
                lambda: f"{noun()} and {noun()}", lambda: f"{verb()} the {noun()}",
                lambda: f"the {adjective()} {noun()}")
    while True:
        text, scene, style = rng.choice(patterns)(), rng.choice(SCENES), rng.choice(STYLES)
        case = rng.choice((str.upper, str.title, str.capitalize))
        if held_out(text) == (split == "eval"):  # decided in lower case, so that it holds for every spelling
            yield f'{scene} "{case(text)}"{style}'


ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon
fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog
chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo""".split()


def animal_prompts(split, rng):
    """The 45 common animals of DDPO (Black et al. 2023): `a cat`, `an ant`. Four of them are held out."""
    animals = [animal for animal in ANIMALS if held_out(animal) == (split == "eval")]
    while True:
        yield with_article(rng.choice(animals))


ACTIVITIES = "washing the dishes", "playing chess", "riding a bike"


def activity_prompts(split, rng):
    """Animals at things that no photograph shows, DDPO's alignment task: `an ant playing chess`."""
    pairs = [f"{with_article(animal)} {activity}" for animal in ANIMALS for activity in ACTIVITIES]
    pairs = [pair for pair in pairs if held_out(pair) == (split == "eval")]
    while True:
        yield rng.choice(pairs)


def with_article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


NUMBERS = "zero one two three four".split()
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "computer mouse": "computer mice"}
PORTIONS = {"skis": "pair", "scissors": "pair", "broccoli": "head"}  # counted by these


def geneval_prompts(split, rng):
    """GenEval's six tasks in turn over COCO's 80 classes: pairs (prompt, metadata), the metadata as in its
    evaluation_metadata.jsonl. Worded as there, with better grammar: two knives, a pair of red skis.

    Prompts that differ only in the order of their objects are in one split (Flow-GRPO, Liu et al. 2025).
    """
    while True:
        for task in TASKS:
            while True:
                parts, metadata = geneval_prompt(task, rng)
                if held_out(" and ".join(sorted(parts))) == (split == "eval"):
                    break
            yield f"a photo of {' and '.join(parts)}", {"tag": task, **metadata}


def geneval_prompt(task, rng):
    """A prompt of one of TASKS: ([what `and` joins], {include, exclude})."""
    a, b = rng.sample(CLASSES[1:] if "color" in task else CLASSES, 2)  # no person is green
    n, (color, other), relation = rng.randint(2, 4), rng.sample(COLORS, 2), rng.choice(RELATIONS)
    first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
    if task == "single_object":
        return [phrase(a)], {"include": [first]}
    if task == "two_object":
        return [phrase(a), phrase(b)], {"include": [first, second]}
    if task == "counting":
        too_many = {"class": a, "count": n + 1}
        return [phrase(a, n)], {"include": [{**first, "count": n}], "exclude": [too_many]}
    if task == "colors":
        return [phrase(a, 1, color)], {"include": [{**first, "color": color}]}
    if task == "position":
        place = {**first, "position": [relation, 0]}
        return [f"{phrase(a)} {relation} {phrase(b)}"], {"include": [second, place]}
    return [phrase(a, 1, color), phrase(b, 1, other)], {
        "include": [{**first, "color": color}, {**second, "color": other}]}


def phrase(name, count=1, color=None):
    """A class in words: `an apple`, `three people`, `a pair of red skis`."""
    name, portion = f"{color} {name}" if color else name, PORTIONS.get(name)
    if count == 1:
        return with_article(f"{portion} of {name}" if portion else name)
    return f"{NUMBERS[count]} {f'{portion}s of {name}' if portion else plural(name)}"


def plural(noun):
    return PLURALS.get(noun) or noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


PROMPTS = {"ocr": text_prompts, "signs": sign_prompts, "animals": animal_prompts,
           "activities": activity_prompts, "geneval": geneval_prompts}


# What a run asks for, and what it shows

def load_task(args, device):
    """What the settings of a script ask for: (reward, judge, stream, prompts, metadata).

    judge: the rewards of --eval-rewards that are not trained on, or None. stream: endless training pairs
    (prompt, metadata). prompts, metadata: the held-out ones, `eval_images` of them or all of --eval-prompts.
    ValueError or OSError, of one line, for what cannot be loaded and for a prompt that cannot be scored.
    """
    source = args.prompts or default_prompts(args.reward)
    stream = prompts(source, "train", args.seed)
    held_out = prompts(source, "eval", args.seed)
    texts, metadata = zip(*(read_prompt_file(args.eval_prompts) if args.eval_prompts else
                            islice(cycle(held_out), args.eval_images)))
    reward = load(args.reward, device, args.reward_batch)
    judge = load_unseen(args.eval_rewards, args.reward, device, args.reward_batch)
    if args.epochs:
        check(reward, source)
    for scorer in filter(None, (reward, judge)):
        scorer.check(texts, metadata)
    return reward, judge, stream, texts, metadata


def summary(R, parts):
    """What a line of metrics.jsonl says of rewards: their mean, their spread over images, and each part's."""
    return {"reward": R.mean().item(), "reward_std": R.std(correction=0).item(),
            **{name: part.mean().item() for name, part in parts.items()}}


def evaluation(reward, judge, images, prompts, metadata):
    """Score held-out images: (R (B,) of `reward`, a `summary` with judge's means, the benchmarks' tables).

    A reward of `judge` that goes by a name of the trained one's has " (unseen)" after it. The tables are
    {"geneval details": {row: value}} of what was run, often none.
    """
    R, parts = reward.score(images, prompts, metadata)
    unseen = judge.score(images, prompts, metadata)[1] if judge else {}
    unseen = {name + " (unseen)" * (name in parts): scores for name, scores in unseen.items()}
    details = {f"{name} details": rows for scorer in filter(None, (reward, judge))
               for name, rows in tables(scorer).items()}
    return R, summary(R, {**parts, **unseen}), details


def write_aside(path, write):
    """Call write(aside) on a path beside `path`, then rename: a killed save leaves the previous file."""
    aside = f"{path}.aside"
    write(aside)
    os.replace(aside, path)


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


LINE_COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#475569", "#dc2626")


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
    for color, (label, group) in zip(cycle(LINE_COLORS), curves.items()):
        for run in group:
            pen.line([at(*p) for p in run], fill=color, width=S)
        mean = [[sum(values) / len(group) for values in zip(*points)] for points in zip(*group)]
        pen.line([at(*p) for p in mean], fill=color, width=3 * S)
        legend.append((label, color))
    for color, (label, y) in zip(reversed(LINE_COLORS), levels.items()):
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


def show(folder, split, epoch, name, images, prompts, R, means, tables):
    """Show an evaluation: a line on the console, the first images as a contact sheet, and the run's curve."""
    others = "".join(f"  {key} {value:.4f}" for key, value in means.items()
                     if key not in ("reward", "reward_std", name))
    tqdm.write(f"epoch {epoch:4d}  held-out {name} {means['reward']:.4f}{others}")
    for table, rows in tables.items():
        tqdm.write(f"            {table}: " + "  ".join(f"{row} {value:.3f}" for row, value in rows.items()))
    captions = [f"{r:.2f}  {prompt}" for r, prompt in zip(R.tolist(), prompts)]
    sheet = "test" if split == "test" else f"epoch-{epoch:04d}"
    contact_sheet(folder / "samples" / f"{sheet}.png", images[:16], captions[:16])
    curves = {split: [reward_curve(folder, split)] for split in ("train", "eval")}
    if split == "eval":
        plot(folder / "curve.png", {split: runs for split, runs in curves.items() if runs[0]}, name)


def rewind_metrics(folder, epoch):
    """Take away the lines of metrics.jsonl that a run resumed at `epoch` writes again."""
    last = {"train": epoch - 1, "eval": epoch, "test": math.inf}
    lines = [json.dumps(m) + "\n" for m in read_metrics(folder) if m["epoch"] <= last[m["split"]]]
    write_aside(Path(folder, "metrics.jsonl"), lambda aside: Path(aside).write_text("".join(lines)))


def hush():
    """Keep the loading bars and the warnings of diffusers and transformers off the console."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
