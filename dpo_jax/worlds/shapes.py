"""Captioned coloured shapes: a synthetic world of small images with an exact judge.

A caption names one shape ("a red circle") or two of different colours and where the first one stands ("a red circle
left of a blue square"). All shapes of one radius have one area, so that size says nothing of the kind. A colour of
saturation s is s times the pure one, on a dark grey ground: how far a pixel's channels spread is then exactly
saturation times coverage, which is all that the judge reads.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SIZE = 32
GROUND = -0.6
PURE = {  # in the order of their hues, 60 degrees apart
    "red": (1, -1, -1),
    "yellow": (1, 1, -1),
    "green": (-1, 1, -1),
    "cyan": (-1, 1, 1),
    "blue": (-1, -1, 1),
    "magenta": (1, -1, 1),
}
COLOURS = tuple(PURE)
KINDS = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
SATURATIONS = (0.5, 1.0)

PAD, BOS, EOS = 0, 1, 2
WORDS = ("<pad>", "<s>", "</s>", "a", *COLOURS, *KINDS, "left", "right", "of", "above", "below")
_IDS = {word: i for i, word in enumerate(WORDS)}
VOCABULARY_SIZE = 24  # a multiple of 8, so that the vocabulary can be sharded
CAPTION_LENGTH = 10  # of the longest caption with BOS and EOS

SUBPIXELS = 4  # per side of a pixel
LEAST_SATURATION = 0.22  # of a pixel that belongs to a shape
LEAST_AREA = 0.012  # of a shape, as a share of the image; less is a speck

_SIDE = math.sqrt(math.pi) / 2  # half of the square's side
_INNER = math.sqrt(math.pi / (3 * math.sqrt(3)))  # radius of the circle inside the triangle
_ARM = math.sqrt(math.pi * 9 / 20)  # of the cross, three times as long as it is half wide


class Thing(NamedTuple):
    """A shape: centre (x to the right, y down) and radius as shares of the image's side, saturation in [0, 1]."""

    colour: str
    kind: str
    x: float
    y: float
    radius: float
    saturation: float


class Wanted(NamedTuple):
    """What a caption says: colours and kinds of one or two shapes, and the relation of the first to the second."""

    things: tuple[tuple[str, str], ...]
    relation: str | None


class Seen(NamedTuple):
    """A shape that was read from an image; `form` in [0, 1] is how well it covers the ideal shape of its kind."""

    colour: str
    kind: str
    x: float
    y: float
    radius: float
    saturation: float
    form: float


class Verdict(NamedTuple):
    """What the judge says of an image for a caption.

    Attributes:
      score: in [0, 1], `count` times the mean of `colour`, `shape` and, if the caption has two shapes, `relation`.
      correct: all of these are 1.
      colour, shape: share of the caption's shapes that are there in their colour, in their kind.
      relation: 1.0 if the two shapes stand as the caption says (or it has one only), else 0.0.
      count: 1.0 if the image shows no more shapes than the caption names, else named divided by shown.
      saturation: mean over the shapes that were matched; 0.0 if there are none. Not part of the score.
      form: the same mean of their form. Not part of the score.
    """

    score: float
    correct: bool
    colour: float
    shape: float
    relation: float
    count: float
    saturation: float
    form: float


def parse(caption: str) -> Wanted:
    """What a caption says.

    Raises:
      ValueError: a text that the grammar does not have.
    """
    for relation in (None, *RELATIONS):
        parts = caption.split(f" {relation} ") if relation else [caption]
        things = [tuple(part.split(" ")) for part in parts]
        if len(things) != (2 if relation else 1) or any(len(thing) != 3 for thing in things):
            continue
        pairs = tuple((colour, kind) for _, colour, kind in things)
        known = all(a == "a" and c in COLOURS and k in KINDS for a, c, k in things)
        if known and len({colour for colour, _ in pairs}) == len(pairs):
            return Wanted(pairs, relation)
    forms = "'a COLOUR KIND' or 'a COLOUR KIND RELATION a COLOUR KIND' with two colours"
    raise ValueError(f"the shape world has no caption {caption!r}; expected {forms}")


def _write(wanted: Wanted) -> str:
    return f" {wanted.relation} ".join(f"a {colour} {kind}" for colour, kind in wanted.things)


def all_captions() -> tuple[str, ...]:
    """Every caption: 24 of one shape, then 1920 of two."""
    things = list(itertools.product(COLOURS, KINDS))
    twos = [(a, b) for a in things for b in things if a[0] != b[0]]
    wanted = [Wanted((thing,), None) for thing in things]
    return tuple(map(_write, wanted + [Wanted(two, relation) for two in twos for relation in RELATIONS]))


def make_captions(count: int, seed: int, *, singles: float = 0.5) -> list[str]:
    """Random captions, a share `singles` of them of one shape."""
    random = np.random.default_rng(seed)
    captions = all_captions()
    ones = len(COLOURS) * len(KINDS)
    single = random.random(count) < singles
    places = np.where(single, random.integers(ones, size=count), random.integers(ones, len(captions), size=count))
    return [captions[place] for place in places]


def edit_caption(caption: str, random: np.random.Generator) -> str:
    """The caption with one colour, kind or relation replaced by another."""
    things, relation = parse(caption)
    place = int(random.integers(2 * len(things) + (relation is not None)))
    if place == 2 * len(things):
        other = str(random.choice([name for name in RELATIONS if name != relation]))
        return _write(Wanted(things, other))
    index, part = divmod(place, 2)
    names = KINDS if part else COLOURS
    taken = {things[index][part], *(() if part else (colour for colour, _ in things))}
    changed = list(things[index])
    changed[part] = str(random.choice([name for name in names if name not in taken]))
    return _write(Wanted((*things[:index], (changed[0], changed[1]), *things[index + 1 :]), relation))


def draw_scene(caption: str, random: np.random.Generator) -> tuple[Thing, ...]:
    """Random places, sizes and saturations that make the caption true; shapes stand inside the image and apart.

    Raises:
      ValueError: a text that the grammar does not have.
    """
    wanted = parse(caption)
    saturations = random.uniform(*SATURATIONS, size=2)
    if wanted.relation is None:
        radius, (x, y) = random.uniform(0.16, 0.26), random.uniform(0.45, 0.55, size=2)
        return (Thing(*wanted.things[0], x, y, radius, saturations[0]),)
    radii, across = random.uniform(0.11, 0.15, size=2), random.uniform(0.42, 0.58, size=2)
    along = [random.uniform(0.25, 0.27), random.uniform(0.74, 0.78)]
    if wanted.relation in ("right of", "below"):
        along.reverse()
    places = zip(along, across) if wanted.relation in ("left of", "right of") else zip(across, along)
    return tuple(Thing(*t, x, y, r, s) for t, (x, y), r, s in zip(wanted.things, places, radii, saturations))


def render(scene: Sequence[Thing], size: int = SIZE) -> np.ndarray:
    """The scene, float32 [size, size, 3] in [-1, 1]; later shapes cover earlier ones; antialiased by supersampling."""
    image = np.full((size, size, 3), GROUND)
    for thing in scene:
        cover = _coverage(thing.kind, thing.x, thing.y, thing.radius, size)[:, :, None]
        image = (1 - cover) * image + cover * thing.saturation * np.array(PURE[thing.colour])
    return image.astype(np.float32)


def _coverage(kind: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """Share of every pixel that the shape covers, [size, size]."""
    fine = (np.arange(size * SUBPIXELS) + 0.5) / (size * SUBPIXELS)
    u, v = (fine[None, :] - x) / radius, (fine[:, None] - y) / radius
    if kind == "circle":
        inside = u**2 + v**2 <= 1
    elif kind == "square":
        inside = (np.abs(u) <= _SIDE) & (np.abs(v) <= _SIDE)
    elif kind == "triangle":
        inside = (v <= _INNER) & (math.sqrt(0.75) * np.abs(u) - 0.5 * v <= _INNER)
    else:
        bars = [(np.abs(a) <= _ARM) & (np.abs(b) <= _ARM / 3) for a, b in ((u, v), (v, u))]
        inside = bars[0] | bars[1]
    return inside.reshape(size, SUBPIXELS, size, SUBPIXELS).mean(axis=(1, 3))


def make_images(captions: Sequence[str], seed: int, size: int = SIZE) -> np.ndarray:
    """One random true image for each caption, float32 [N, size, size, 3] in [-1, 1]."""
    random = np.random.default_rng(seed)
    return np.stack([render(draw_scene(caption, random), size) for caption in captions])


def look(image: np.ndarray) -> list[Seen]:
    """The shapes of any image [H, H, 3], from left to right; values that are not finite count as grey or full.

    Raises:
      ValueError: an array of another form.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"an image of the form {list(image.shape)}; the shape world has square ones, [H, H, 3]")
    image = np.nan_to_num(image.astype(np.float64), nan=0.0, posinf=1.0, neginf=-1.0).clip(-2, 2)
    red, green, blue = np.moveaxis(image, -1, 0)
    # Position of a colour on the plane across the greys; a pure one has length 1, its hue is the angle.
    spread = ((red - (green + blue) / 2) + 1j * math.sqrt(0.75) * (green - blue)) / 2
    smooth = _smooth(spread)
    hues = np.rint(np.angle(smooth) / (math.pi / 3)).astype(int) % len(COLOURS)
    parts = _components(np.where(np.abs(smooth) > LEAST_SATURATION, hues, -1))
    parts = [part for part in parts if part.sum() >= LEAST_AREA * part.size]
    taken = np.sum(parts, axis=0) if parts else np.zeros(spread.shape)
    seen = [_describe(part, spread, smooth, _grow(part) & (taken - part == 0)) for part in parts]
    return sorted((shape for shape in seen if shape is not None), key=lambda shape: shape.x)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A 3 x 3 binomial filter; noise shrinks to 3/8."""
    for axis in (0, 1):
        padded = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        low, high = np.split(padded, [-2], axis=axis)[0], np.split(padded, [2], axis=axis)[1]
        values = (low + 2 * values + high) / 4
    return values


def _grow(part: np.ndarray) -> np.ndarray:
    """The part and the pixels next to it."""
    padded = np.pad(part, 1)
    height, width = part.shape
    moves = itertools.product(range(3), range(3))
    return np.any([padded[i : i + height, j : j + width] for i, j in moves], axis=0)


def _components(labels: np.ndarray) -> list[np.ndarray]:
    """Masks of the connected regions (4 neighbours) of one label each; label -1 is none."""
    height, width = labels.shape
    flat = labels.ravel().tolist()
    left = {place for place, label in enumerate(flat) if label >= 0}
    parts = []
    while left:
        start = left.pop()
        stack, found = [start], [start]
        while stack:
            place = stack.pop()
            column = place % width
            for near in (
                place - width,
                place + width,
                place - 1 if column else -1,
                place + 1 if column < width - 1 else -1,
            ):
                if near in left and flat[near] == flat[start]:
                    left.remove(near)
                    stack.append(near)
                    found.append(near)
        mask = np.zeros(height * width, bool)
        mask[found] = True
        parts.append(mask.reshape(height, width))
    return sorted(parts, key=lambda mask: int(mask.argmax()))


def _describe(part: np.ndarray, spread: np.ndarray, smooth: np.ndarray, region: np.ndarray) -> Seen | None:
    """Colour, place, size and kind of one region, from how much of every pixel it covers."""
    size = part.shape[0]
    strength = np.abs(smooth) * part
    core = strength >= 0.85 * np.quantile(strength[part], 0.9)
    colour = spread[core].mean()
    saturation = abs(colour)
    if saturation < LEAST_SATURATION:
        return None
    # Linear in the pixels and not clipped, so that noise averages out of the moments.
    cover = np.where(region, (spread * np.conj(colour)).real / saturation**2, 0.0)
    area = cover.sum()
    if area < LEAST_AREA * part.size:
        return None
    across, down = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    x, y = (cover * across).sum() / area, (cover * down).sum() / area
    radius = math.sqrt(area / math.pi)
    # The first two moments fix place and size; the kind is then the one that leaves the least squares.
    ideals = {kind: _coverage(kind, x / size, y / size, radius / size, size) for kind in KINDS}
    kind = min(KINDS, key=lambda name: np.square(cover - ideals[name]).sum())
    ideal = ideals[kind]
    clipped = cover.clip(0, 1)
    form = np.minimum(clipped, ideal).sum() / np.maximum(clipped, ideal).sum()
    hue = COLOURS[round(float(np.angle(colour)) / (math.pi / 3)) % len(COLOURS)]
    return Seen(hue, kind, x / size, y / size, radius / size, min(float(saturation), 1.0), float(form))


def judge(caption: str, image: np.ndarray) -> Verdict:
    """Exact verdict on any image, float [H, H, 3] in [-1, 1], for a caption.

    Measured on 1000 random scenes of 32 x 32 pixels with normal noise of deviation sigma on every channel (and after
    a 3 x 3 binomial blur): share of true captions that are not `correct`, share of captions with one wrong word that
    are, and mean error of the saturation.

        sigma       0.0    0.1    0.2    0.3    0.4    blurred
        missed      0.000  0.000  0.000  0.006  0.030  0.006
        accepted    0.000  0.000  0.000  0.000  0.001  0.000
        saturation  0.000  0.007  0.020  0.050  0.090  0.012

    At 16 x 16 pixels 0.000, 0.012 and 0.067 are missed for sigma 0.0, 0.1 and 0.2; blurred, 0.4.

    Raises:
      ValueError: a text that the grammar does not have.
    """
    wanted = parse(caption)
    seen = look(image)
    padded = [*seen, *[None] * (len(wanted.things) - len(seen))]
    matched = max(itertools.permutations(padded, len(wanted.things)), key=lambda some: _agreement(wanted, some))
    colour, shape = (
        float(np.mean([thing is not None and thing[i] == named[i] for named, thing in zip(wanted.things, matched)]))
        for i in (0, 1)
    )
    there = [thing for thing in matched if thing is not None]
    relation = float(wanted.relation is None or (len(there) == 2 and _relation(*there) == wanted.relation))
    count = min(1.0, len(wanted.things) / max(len(seen), 1))
    asked = (colour, shape, relation) if wanted.relation else (colour, shape)
    saturation, form = (float(np.mean([thing[i] for thing in there])) if there else 0.0 for i in (5, 6))
    correct = min(*asked, count) == 1.0
    return Verdict(count * sum(asked) / len(asked), correct, colour, shape, relation, count, saturation, form)


def _agreement(wanted: Wanted, some: Sequence[Seen | None]) -> float:
    """Colours and kinds that agree; the larger shape wins a tie."""
    pairs = [(named, thing) for named, thing in zip(wanted.things, some) if thing is not None]
    return sum((t.colour == c) + (t.kind == k) + 0.1 * t.radius for (c, k), t in pairs)


def _relation(first: Seen, second: Seen) -> str:
    """Where the first stands, by the larger of the two distances."""
    right, down = first.x - second.x, first.y - second.y
    if abs(right) >= abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def encode(caption: str) -> np.ndarray:
    """Token ids int32 [CAPTION_LENGTH]: BOS, a word each, EOS and padding; "" is the empty caption.

    Raises:
      ValueError: a word that the world does not have, or too many.
    """
    words = caption.split()
    strange = sorted(set(words) - set(WORDS[EOS + 1 :]))
    if strange or len(words) > CAPTION_LENGTH - 2:
        reason = f"no words {strange}" if strange else f"no captions of {len(words)} words"
        raise ValueError(f"the shape world has {reason}; it has {CAPTION_LENGTH - 2} of {', '.join(WORDS[EOS + 1 :])}")
    ids = [BOS, *(_IDS[word] for word in words), EOS]
    return np.array(ids + [PAD] * (CAPTION_LENGTH - len(ids)), np.int32)


def decode(ids: np.ndarray) -> str:
    """The caption of token ids up to the first EOS; unused ids are shown as '?'."""
    tokens = [int(i) for i in ids]
    tokens = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return " ".join(WORDS[i] if EOS < i < len(WORDS) else "?" for i in tokens if i not in (PAD, BOS))


def as_bytes(images: np.ndarray) -> np.ndarray:
    """uint8 of the same shape for images in [-1, 1]."""
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def make_rows(form: str, count: int, seed: int, size: int = SIZE) -> list[dict]:
    """Image rows of the world; wrong images show an edited caption.

    Args:
      form: "pairs" (with the judge's scores of both), "singles" (every other one wrong, with labels) or "lists" (right,
        once and twice edited, with scores).
      count: of the rows.
      seed: of captions and images.
      size: of the images, uint8 [size, size, 3].

    Raises:
      ValueError: another form.
    """
    random = np.random.default_rng(seed)
    return [_row(form, number, caption, random, size) for number, caption in enumerate(make_captions(count, seed))]


def _row(form: str, number: int, caption: str, random: np.random.Generator, size: int) -> dict:
    edited = edit_caption(caption, random)
    shown = [caption, edited, edit_caption(edited, random)]
    images = [as_bytes(render(draw_scene(text, random), size)) for text in shown]
    scores = [judge(caption, image / 127.5 - 1).score for image in images]
    if form == "pairs":
        known = {"chosen_score": scores[0], "rejected_score": scores[1]}
        return {"caption": caption, "chosen": images[0], "rejected": images[1], **known}
    if form == "singles":
        return {"caption": caption, "image": images[number % 2], "label": number % 2 == 0}
    if form == "lists":
        order = sorted(range(3), key=lambda i: -scores[i])
        return {"caption": caption, "images": [images[i] for i in order], "scores": [scores[i] for i in order]}
    raise ValueError(f"the shape world has no rows of {form!r}; there are pairs, singles and lists")
