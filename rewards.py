"""Rewards and prompts: what the two algorithms optimise, and what they draw.

A reward looks at finished pictures and gives each a number; nothing here is differentiated.

    reward = load("ocr", "cuda")                              # text rendering, read by PP-OCRv5
    reward = load("ocr@tiny-sd3", "cpu")                      # the same with the models of a folder
    reward = load("ocr:1,incompressibility:-0.005", "cuda")   # a weighted sum
    rewards = reward(images, prompts, metadata)               # PIL images, str, dict -> (B,) tensor on CPU
    rewards, parts = reward.score(images, prompts, metadata)  # the same, and {name: (B,)} unweighted, to log

A spec is `name[@path-or-repo][:weight]`, several joined by commas. A prompt comes with its metadata, a dict
that says at least `where` it came from: `prompts(source, split, seed)` yields such pairs.

To add a reward, subclass `Reward`: give it a `name`, a `range`, a `measure`, a `check` if it cannot score
every prompt, and a line in `REWARDS`. A reward that fails stops the run. It never quietly becomes 0: an
optimiser would learn from that zero.

PP-OCR runs on torch, transformers and Pillow alone. The image processors of transformers need torchvision and
OpenCV; what they do takes a page here. Their constants are in each checkpoint's preprocessor_config.json.
"""

import io
import json
import math
import random
import re
import zlib
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

EVAL_SIZE = 512  # evaluation prompts, at most


# The interface

class Reward:
    """Scores pictures. `range` = (lo, hi) is where they lie, used only to put them on [0, 1]: `normalize`."""

    name, range = "reward", (0.0, 1.0)

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

    def score(self, images, prompts, metadata):
        """Rewards (B,) and their parts {name: (B,)}, float32 on the CPU. Any failure is a RuntimeError."""
        try:
            scores = torch.as_tensor(self.measure(images, prompts, metadata)).detach().float().cpu()
        except Exception as cause:
            raise RuntimeError(f"reward {self.name} failed: {type(cause).__name__}: {cause}") from cause
        if scores.shape != (len(images),):
            raise RuntimeError(f"reward {self.name} gave scores of shape {tuple(scores.shape)} "
                               f"for {len(images)} images")
        if not scores.isfinite().all():
            i = int((~scores.isfinite()).nonzero()[0])
            raise RuntimeError(f"reward {self.name} gave {scores[i].item()} for the prompt {prompts[i]!r}")
        return scores, {self.name: scores}

    def __call__(self, images, prompts, metadata):
        return self.score(images, prompts, metadata)[0]


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


def load(spec, device):
    """The Reward of `name[@path-or-repo][:weight],...`, its models on `device`.

    ValueError: an unknown name or a malformed spec. OSError: weights that cannot be loaded.
    """
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
    heads, names = [part[3] for part in parts], [part[1] for part in parts]
    if len(set(heads)) < len(heads):
        raise ValueError(f"a reward comes twice in {spec!r}: add the two weights up instead")
    rewards = []
    for weight, name, path, head in parts:
        reward = REWARDS[name](path, device)
        reward.name = name if names.count(name) == 1 else head
        rewards.append((weight, reward))
    return rewards[0][1] if len(rewards) == 1 and rewards[0][0] == 1 else WeightedSum(rewards)


def normalize(rewards, range):
    """Rewards on [0, 1]: `(r - lo) / (hi - lo)`, clipped."""
    lo, hi = range
    return ((rewards - lo) / (hi - lo)).clamp(0, 1)


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

    name, range = "ocr", (0.0, 1.0)

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
    try:
        if not Path(path).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise OSError("no such folder")
        settings = cached_file(path, "preprocessor_config.json", subfolder=subfolder)
        settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if value is not None}
        model, report = auto.from_pretrained(path, subfolder=subfolder, dtype=torch.float32,
                                             use_safetensors=True, output_loading_info=True)
    except Exception as cause:
        place = "/".join(filter(None, (path, subfolder)))
        reason = str(cause).strip().partition("\n")[0]
        raise OSError(f"reward ocr: cannot load {place} ({reason}). Name a folder or a repository that has "
                      "ocr-det and ocr-rec in it, as in ocr@tiny-sd3; plain ocr downloads PP-OCRv5 from "
                      "huggingface.co") from cause
    missing = [key for key in report["missing_keys"] if "num_batches_tracked" not in key]
    if missing:  # transformers would only warn, and leave them random
        raise OSError(f"reward ocr: {path} lacks {len(missing)} of the model's tensors, as {missing[0]}")
    return model.to(device).eval(), settings


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


REWARDS = {"ocr": OCR, "compressibility": Compressibility, "incompressibility": Incompressibility}


# Prompts

def held_out(text):
    """True for the eighth of all texts kept for evaluation. A checksum decides: the split needs no list."""
    return zlib.crc32(text.encode()) % 8 == 0


def prompts(source, split, seed):
    """Pairs (prompt, metadata) from a generator ("ocr", "signs", "animals") or a .txt or .jsonl file.

    split "train": endless, decided by `seed`. split "eval": a list of at most EVAL_SIZE, whatever the seed.
    No evaluation text (`ocr`), word (`signs`), animal (`animals`) or prompt (file) is ever trained on.
    metadata["where"] says where a prompt came from. ValueError, with file and line, for a bad file.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"the split is train or eval, not {split!r}")
    if Path(source).suffix or source not in PROMPTS:
        return file_prompts(source, split, seed)
    where = {"where": f"prompt generator {source}"}
    if split == "train":
        return ((prompt, dict(where)) for prompt in PROMPTS[source]("train", random.Random(seed)))
    # Generators with few evaluation prompts repeat themselves: stop looking after a while.
    distinct = dict.fromkeys(islice(PROMPTS[source]("eval", random.Random(0)), 4 * EVAL_SIZE))
    return [(prompt, dict(where)) for prompt in islice(distinct, EVAL_SIZE)]


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
        animal = rng.choice(animals)
        yield f"{'an' if animal[0] in 'aeiou' else 'a'} {animal}"


PROMPTS = {"ocr": text_prompts, "signs": sign_prompts, "animals": animal_prompts}
