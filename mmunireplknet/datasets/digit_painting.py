"""What a digit scene looks like: the sources, their split, the difficulties, and the painter.

:mod:`mmunireplknet.datasets.digit_scenes` writes the scenes of this file to disk. Digits are from the UCI
optical recognition set (https://archive.ics.uci.edu/dataset/80, 8x8 pixels, inside scikit-learn); the
photographs are inside the wheels of scikit-image and scikit-learn. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SPLITS = ('train', 'val')
DIGIT_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
HOLES = ((1,), (0,), (0,), (0,), (0, 1), (0,), (1,), (0,), (2,), (1,))  # that the shape of each digit may have
THICKEST = 0.36  # stroke, as a fraction of its height: beyond, 8x8 pixels leave a blob
# Sample numbers of sklearn.datasets.load_digits. Near samples there are alike: the split is one cut.
DIGIT_SPLIT: Mapping[str, range] = {'train': range(0, 1437), 'val': range(1437, 1797)}


@dataclass(frozen=True)
class Photograph:
    """A photograph that a Python package carries.

    Args:
        package: import name of the package.
        file: path inside the package.
        tint: factors on red, green and blue; what gives a grey photograph a colour.
        margin: fraction of the width and height to leave out at every border.
    """

    package: str
    file: str
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    margin: float = 0.0


# No photograph is in both splits; the two motorcycles are one stereo pair and so are kept together.
PHOTOGRAPHS: Mapping[str, tuple[Photograph, ...]] = {
    'train': (
        Photograph('skimage', 'data/astronaut.png'),
        Photograph('skimage', 'data/coffee.png'),
        Photograph('skimage', 'data/motorcycle_left.png'),
        Photograph('skimage', 'data/motorcycle_right.png'),
        Photograph('sklearn', 'datasets/images/china.jpg'),
        Photograph('skimage', 'data/ihc.png'),
        Photograph('skimage', 'data/retina.jpg', margin=0.2),
        Photograph('skimage', 'data/hubble_deep_field.jpg'),
        Photograph('skimage', 'data/grass.png', tint=(0.95, 1.2, 0.6)),
        Photograph('skimage', 'data/brick.png', tint=(1.4, 1.0, 0.8)),
        Photograph('skimage', 'data/coins.png', tint=(1.0, 0.90, 0.72)),
    ),
    'val': (
        Photograph('skimage', 'data/chelsea.png'),
        Photograph('skimage', 'data/rocket.jpg'),
        Photograph('sklearn', 'datasets/images/flower.jpg'),
        Photograph('skimage', 'data/gravel.png', tint=(1.0, 0.93, 0.82)),
    ),
}


@dataclass(frozen=True)
class Difficulty:
    """What makes scenes easy or hard.

    Args:
        num_classes: digits 0 to ``num_classes - 1`` occur, 1 to 10.
        digits: least and most digits an image.
        scale: least and most height of an upright digit, as a fraction of the shorter image side.
        rotation: largest turn either way, in degrees.
        overlap: probability that a digit is put across an earlier one; otherwise it touches none.
        min_visible: least fraction of every digit that stays visible.
        contrast: least CIE76 colour difference between a digit and the fifth of what is around and beneath
            it that is most like it. Where no colour reaches it, the best one found is taken.
        relief: strength of light, shade and shadow, 0 (flat) to 1.

    Raises:
        ValueError: a value is out of its range.
    """

    num_classes: int = 10
    digits: tuple[int, int] = (3, 6)
    scale: tuple[float, float] = (0.34, 0.56)
    rotation: float = 20.0
    overlap: float = 0.35
    min_visible: float = 0.7
    contrast: float = 45.0
    relief: float = 0.8

    def __post_init__(self) -> None:
        rules = {
            'num_classes': (1 <= self.num_classes <= 10, '1 to 10'),
            'digits': (1 <= self.digits[0] <= self.digits[1], '(least, most) with 1 <= least <= most'),
            'scale': (0 < self.scale[0] <= self.scale[1] <= 0.9, '(least, most) with 0 < least <= most <= 0.9'),
            'rotation': (0 <= self.rotation <= 45, '0 to 45 degrees: beyond, a 6 reads as a 9'),
            'overlap': (0 <= self.overlap <= 1, '0 to 1'),
            'min_visible': (0 < self.min_visible <= 1, 'above 0, to 1'),
            'contrast': (0 <= self.contrast <= 100, '0 to 100'),
            'relief': (0 <= self.relief <= 1, '0 to 1'),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f'Difficulty.{name} is {getattr(self, name)!r}; expected {expected}')


DIFFICULTIES: Mapping[str, Difficulty] = {
    'easy': Difficulty(10, (3, 6), (0.30, 0.48), 12.0, 0.0, 1.0, 60.0, 0.8),
    'medium': Difficulty(),
    'hard': Difficulty(10, (3, 6), (0.24, 0.50), 35.0, 0.5, 0.55, 28.0, 0.6),
}


@dataclass(frozen=True)
class Instance:
    """One digit of a scene: ``digit`` is 0 to 9, ``mask`` (H, W) bool holds the pixels that are visible."""

    digit: int
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One image and its truth.

    ``image`` is (H, W, 3) uint8 RGB; ``semantic`` is (H, W) uint8 with 0 for the background and digit + 1;
    ``instances`` are in painting order, the last one in front. Their masks part the foreground of ``semantic``.
    """

    image: np.ndarray
    semantic: np.ndarray
    instances: tuple[Instance, ...]


def paint(seed: int, split: str, index: int, size: tuple[int, int], difficulty: Difficulty) -> Scene:
    """Paint one scene. The same arguments give the same scene, whatever was painted before.

    Args:
        seed: of the whole data set, >= 0.
        split: 'train' or 'val'.
        index: number of the image in its split.
        size: (height, width) in pixels.
        difficulty: what to draw.

    Raises:
        ImportError: scikit-learn or scikit-image is missing.
        FileNotFoundError: a package is there without its photograph.
        ValueError: the digits do not fit the image as ``difficulty`` wants them.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    for _ in range(20):
        canvas = _background(rng, split, size)
        light = rng.uniform(np.pi, 2 * np.pi)  # from above, left or right
        layers: list[tuple[int, np.ndarray]] = []
        for _ in range(rng.integers(difficulty.digits[0], difficulty.digits[1] + 1)):
            digit = int(rng.integers(difficulty.num_classes))
            alpha = _place(rng, _sample(rng, split, digit), [a for _, a in layers], size, difficulty)
            if alpha is None:
                break
            canvas = _compose(rng, canvas, alpha, light, difficulty)
            layers.append((digit, alpha))
        else:
            return _truth(canvas, layers)
    raise ValueError(
        f'no place for {difficulty.digits} digits of scale {difficulty.scale} in an image of {size}; '
        'ask for fewer, smaller or more overlapping digits, or a larger image'
    )


def _truth(canvas: np.ndarray, layers: Sequence[tuple[int, np.ndarray]]) -> Scene:
    semantic = np.zeros(canvas.shape[:2], np.uint8)
    owner = np.zeros(canvas.shape[:2], np.int32)
    for number, (digit, alpha) in enumerate(layers, 1):
        semantic[alpha >= 0.5] = digit + 1
        owner[alpha >= 0.5] = number
    instances = tuple(Instance(digit, owner == number) for number, (digit, _) in enumerate(layers, 1))
    return Scene(np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8), semantic, instances)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(_missing('sklearn')) from error
    data = load_digits()
    return data.images.astype(np.float32) / 16, data.target


def _missing(package: str) -> str:
    project = {'sklearn': 'scikit-learn', 'skimage': 'scikit-image'}[package]
    return f'Digit Scenes needs {project}, which is not installed; run: pip install {project}'


@lru_cache(maxsize=32)
def _photograph(photograph: Photograph) -> np.ndarray:
    """(H, W, 3) float32 RGB, 0 to 1."""
    spec = find_spec(photograph.package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(_missing(photograph.package))
    path = Path(spec.submodule_search_locations[0], photograph.file)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is not there, though {photograph.package} is installed and its wheel should '
            'carry it; install the version that requirements/demo.txt names'
        )
    with Image.open(path) as file:
        image = np.asarray(file.convert('RGB'), np.float32) / 255
    top, left = (round(photograph.margin * side) for side in image.shape[:2])
    image = image[top : image.shape[0] - top, left : image.shape[1] - left]
    return image * np.array(photograph.tint, np.float32)


def _background(rng: np.random.Generator, split: str, size: tuple[int, int]) -> np.ndarray:
    """A crop of a photograph of ``split``, perhaps mirrored, in slightly other light; (H, W, 3) float32."""
    photo = _photograph(PHOTOGRAPHS[split][rng.integers(len(PHOTOGRAPHS[split]))])
    height, width = size
    # The largest window of the wanted shape, then a part of it: at least a third, and no enlarging where avoidable.
    fit = min(photo.shape[0] / height, photo.shape[1] / width)
    zoom = rng.uniform(max(0.35, min(1 / fit, 1.0)), 1.0) * fit
    h, w = max(1, int(height * zoom)), max(1, int(width * zoom))
    top, left = rng.integers(photo.shape[0] - h + 1), rng.integers(photo.shape[1] - w + 1)
    crop = photo[top : top + h, left : left + w]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA if zoom > 1 else cv2.INTER_CUBIC)
    grey = crop.mean(axis=2, keepdims=True)
    crop = grey + (crop - grey) * np.float32(rng.uniform(0.7, 1.2))
    return np.clip(crop, 0, 1) ** np.float32(rng.uniform(0.75, 1.3)) * np.float32(rng.uniform(0.85, 1.0))


def _sample(rng: np.random.Generator, split: str, digit: int) -> np.ndarray:
    """The outline, as :func:`_outline` gives it, of a handwritten ``digit`` of ``split``."""
    numbers = np.asarray(DIGIT_SPLIT[split])
    numbers = numbers[_digits()[1][numbers] == digit]
    for number in rng.permutation(numbers):
        field = _outline(int(number))
        if field is not None:
            return field
    raise ValueError(f'no readable {digit} among the samples of {split!r}; DIGIT_SPLIT leaves too few')


@lru_cache(maxsize=2048)
def _outline(number: int) -> np.ndarray | None:
    """A smooth field, positive in the stroke of sample ``number``; None where 8x8 pixels do not show it.

    The samples are ink averaged over 4x4 cells, so thin gaps are grey. Of a few ways to sharpen and cut a cubic
    field through them, the first is taken that gives one stroke, and no blob, with as many holes as the digit has.
    """
    images, targets = _digits()
    field = cv2.resize(np.pad(images[number], 3), None, fx=12, fy=12, interpolation=cv2.INTER_CUBIC)
    field = cv2.GaussianBlur(field, (0, 0), 3.5)
    nearby = cv2.GaussianBlur(cv2.dilate(field, np.ones((25, 25), np.uint8)), (0, 0), 8.0)
    for sharpness in (1.0, 2.0, 4.0):
        for ink in (field, field / (0.25 + nearby)):  # as it is, then with faint strokes raised
            sharp = ink + sharpness * (ink - cv2.GaussianBlur(ink, (0, 0), 14.0))
            for cut in (0.4, 0.45, 0.35, 0.5, 0.3, 0.55, 0.25, 0.6, 0.2):
                outline = sharp / sharp.max() - np.float32(cut)
                if _holes(outline > 0) in HOLES[targets[number]] and _thickness(outline > 0) <= THICKEST:
                    return outline
    return None


def _holes(stroke: np.ndarray) -> int:
    """Number of holes in a (H, W) bool stroke; -1 where it is in several pieces or a hole is a mere speck."""
    pieces = cv2.connectedComponents(stroke.astype(np.uint8), connectivity=8)[0] - 1
    count, _, stats, _ = cv2.connectedComponentsWithStats(1 - stroke.astype(np.uint8), connectivity=4)
    return count - 2 if pieces == 1 and stats[:, cv2.CC_STAT_AREA].min() >= 80 else -1


def _thickness(stroke: np.ndarray) -> float:
    """The greatest width of a (H, W) bool stroke, as a fraction of its height."""
    rows = np.flatnonzero(stroke.any(axis=1))
    return 2 * float(cv2.distanceTransform(stroke.astype(np.uint8), cv2.DIST_L2, 5).max()) / (rows[-1] - rows[0] + 1)


def _glyph(field: np.ndarray, height: float, angle: float) -> np.ndarray:
    """The tight coverage, 0 to 1, of an outline ``height`` pixels high, turned by ``angle`` degrees."""
    rows = np.flatnonzero((field > 0).any(axis=1))
    scale = 4 * height / (rows[-1] - rows[0] + 1)
    # The field is 14 sample pixels wide and the ink 8: it stays inside however it is turned.
    side = 4 * int(np.ceil(field.shape[0] * scale / 4))
    matrix: np.ndarray = cv2.getRotationMatrix2D((field.shape[1] / 2, field.shape[0] / 2), angle, scale)
    matrix[:, 2] += side / 2 - field.shape[0] / 2
    turned = cv2.warpAffine(field, matrix, (side, side), flags=cv2.INTER_LINEAR, borderValue=-1.0)
    # Cut at four times the resolution, the mean over 4x4 is the exact coverage of a pixel.
    stroke = (turned > 0).astype(np.float32)
    coverage = cv2.resize(stroke, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
    ys, xs = np.nonzero(coverage)
    return coverage[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _place(
    rng: np.random.Generator,
    outline: np.ndarray,
    earlier: Sequence[np.ndarray],
    size: tuple[int, int],
    difficulty: Difficulty,
) -> np.ndarray | None:
    """Coverage (H, W) of a digit where the rules on overlap hold, or None where no place was found."""
    height = rng.uniform(*difficulty.scale) * min(size)
    angle = rng.uniform(-difficulty.rotation, difficulty.rotation)
    across = bool(earlier) and rng.random() < difficulty.overlap
    masks = [alpha >= 0.5 for alpha in earlier]
    owner = np.zeros(size, np.int32)
    for number, mask in enumerate(masks, 1):
        owner[mask] = number
    needed = [difficulty.min_visible * mask.sum() for mask in masks]
    taken = cv2.dilate((owner > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    for _ in range(12):
        glyph = _glyph(outline, height, angle)
        room = size[0] - glyph.shape[0], size[1] - glyph.shape[1]
        for _ in range(25 if min(room) >= 0 else 0):
            if across:  # within reach of a digit that is there
                ys, xs = np.nonzero(masks[rng.integers(len(masks))])
                reach = rng.uniform(0.35, 0.9) * height
                turn = rng.uniform(0, 2 * np.pi)
                top = round(ys.mean() + reach * np.sin(turn) - glyph.shape[0] / 2)
                left = round(xs.mean() + reach * np.cos(turn) - glyph.shape[1] / 2)
                top, left = int(np.clip(top, 0, room[0])), int(np.clip(left, 0, room[1]))
            else:
                top, left = rng.integers(room[0] + 1), rng.integers(room[1] + 1)
            window = slice(top, top + glyph.shape[0]), slice(left, left + glyph.shape[1])
            new = glyph >= 0.5
            if not across and (taken[window] & new).any():
                continue
            hidden = np.bincount(owner[window][new], minlength=len(masks) + 1)[1:]
            if across and not hidden.any():
                continue
            visible = np.bincount(owner.ravel(), minlength=len(masks) + 1)[1:] - hidden
            if all(v >= n for v, n in zip(visible, needed, strict=True)):
                alpha = np.zeros(size, np.float32)
                alpha[window] = glyph
                return alpha
        height *= 0.92
    return None


def _colour(rng: np.random.Generator, around: np.ndarray, contrast: float) -> np.ndarray:
    """An RGB colour (3,) that stands out from ``around``, (N, 3) RGB, as :class:`Difficulty` says."""
    hsv = np.stack([rng.uniform(0, 360, 24), rng.uniform(0.25, 1, 24), rng.uniform(0.3, 1, 24)], axis=1)
    candidates = cv2.cvtColor(hsv.astype(np.float32)[None], cv2.COLOR_HSV2RGB)
    lab = cv2.cvtColor(candidates, cv2.COLOR_RGB2LAB)[0]
    other = cv2.cvtColor(np.ascontiguousarray(around[None]), cv2.COLOR_RGB2LAB)[0]
    distance = np.quantile(np.linalg.norm(lab[:, None] - other[None], axis=2), 0.2, axis=1)
    good = np.flatnonzero(distance >= contrast)
    return candidates[0, good[0] if len(good) else distance.argmax()]


def _compose(
    rng: np.random.Generator, canvas: np.ndarray, alpha: np.ndarray, light: float, difficulty: Difficulty
) -> np.ndarray:
    """``canvas`` with a digit of coverage ``alpha`` on it, lit from the direction ``light``, in radians."""
    ys, xs = np.nonzero(alpha)
    height = int(np.ptp(ys)) + 1
    margin = height // 8
    box = (
        slice(max(ys.min() - margin, 0), ys.max() + margin + 1),
        slice(max(xs.min() - margin, 0), xs.max() + margin + 1),
    )
    around = canvas[box].reshape(-1, 3)
    colour = _colour(rng, around[:: max(1, len(around) // 400)], difficulty.contrast)
    toward = float(np.cos(light)), float(np.sin(light))  # x, y; y points down
    # The shadow lies away from the light, soft in proportion to the digit.
    shift = np.array([[1, 0, -0.06 * height * toward[0]], [0, 1, -0.06 * height * toward[1]]], np.float32)
    shadow = cv2.warpAffine(alpha, shift, alpha.shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), max(0.6, 0.035 * height))
    canvas = canvas * (1 - 0.6 * difficulty.relief * shadow[..., None])
    # The stroke bulges: its blurred coverage is a height, whose slope toward the light is bright.
    slope = np.gradient(cv2.GaussianBlur(alpha, (0, 0), max(0.8, 0.045 * height)))
    shade = -(slope[1] * toward[0] + slope[0] * toward[1]) * max(0.8, 0.045 * height)
    shine = colour * (1 + difficulty.relief * np.minimum(shade, 0)[..., None] * 1.3)
    shine = shine + (1 - shine) * difficulty.relief * np.maximum(shade, 0)[..., None] * 1.1
    return canvas * (1 - alpha[..., None]) + shine * alpha[..., None]
