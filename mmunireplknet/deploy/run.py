"""Run the exported model beside this file: python run.py IMAGE... (it needs numpy, onnxruntime, pillow)."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps


def resize(array: np.ndarray, size: tuple, axes: tuple = (0, 1), window: list | None = None) -> np.ndarray:
    """A window (begin, end) of each axis (default: all), bilinearly and without antialiasing, as by cv2 and torch."""
    for axis, length, (begin, end) in zip(axes, size, window or [(0, array.shape[n]) for n in axes], strict=True):
        last = array.shape[axis] - 1
        at = np.clip(begin + (np.arange(length) + 0.5) * ((end - begin) / length) - 0.5, 0, last)
        low = at.astype(int)
        part = np.expand_dims(np.float32(at - low), tuple(range(1, array.ndim - axis)))
        array = array.take(low, axis) * (1 - part) + array.take(np.minimum(low + 1, last), axis) * part
    return array


def preprocess(image: np.ndarray, meta: dict) -> tuple:
    """An RGB image (H, W, 3) of 0..255 to the network's input (1, 3, h, w), and the (h, w) of it without padding."""
    rules, limits, (high, wide) = meta['preprocess'], meta['input']['shape'][2:], image.shape[:2]
    rule, crop, divisor = rules['resize'], rules.get('center_crop'), rules.get('size_divisor') or 1
    scale = [int(side * rule['factor'] + 0.5) for side in (wide, high)] if 'factor' in rule else rule.get('scale', 0)
    x, y = np.broadcast_to(scale, 2).tolist()
    ratio = min(max(x, y) / max(high, wide), min(x, y) / min(high, wide))
    size: tuple = {
        'none': (high, wide),
        'exact': (y, x),
        'keep_ratio': (int(high * ratio + 0.5), int(wide * ratio + 0.5)),
        'short_edge': (int(x * high / wide), x) if wide < high else (x, int(x * wide / high)),
    }[rule['mode']]
    ratio = min([1] + [limit / side for limit, side in zip(limits, size, strict=True) if limit and not crop])
    size = tuple(max(1, int(side * ratio + 0.5)) for side in size)  # what a network of one size can take
    for multiple in (1, rule.get('multiple', 1)):  # in two steps, as in training
        size = tuple(-(-side // multiple) * multiple for side in size)
        if rule.get('backend') == 'pillow':
            image = np.asarray(Image.fromarray(image).resize(size[::-1], getattr(Image, rule['interpolation'].upper())))
        elif size != image.shape[:2]:
            image = np.rint({'bilinear': resize}[rule.get('interpolation', 'bilinear')](image, size)).astype(np.uint8)
    top, left = (max(0, round((side - part) / 2)) for side, part in zip(size, crop or size, strict=True))
    image = image[top:, left:][: (crop or size)[0], : (crop or size)[1]]
    image = image if meta['input']['channels'] == 'RGB' else image[..., ::-1]
    pixels = ((image - np.float32(rules['mean'])) / np.float32(rules['std'])).transpose(2, 0, 1)
    pads = [(0, (limits[i] or -(-side // divisor) * divisor) - side) for i, side in enumerate(image.shape[:2])]
    padded = np.pad(pixels, [(0, 0), *pads], constant_values=rules.get('pad_value', 0))
    return padded[None].astype(meta['input']['dtype']), image.shape[:2]


def postprocess(outputs: dict, meta: dict, size: tuple, used: tuple) -> dict:
    """Scores (classes,); or map (height, width); or boxes (k, 4), scores, labels, masks, for an image of that size."""
    first = {name: value[0].astype('f' if value.dtype.kind == 'f' else int) for name, value in outputs.items()}
    if meta['task'] == 'classification':
        raised = np.exp(first['logits'] - first['logits'].max())
        return {'scores': raised / raised.sum()}
    if 'logits' in first:
        return {'map': resize(first['logits'][:, : used[0], : used[1]], size, (1, 2)).argmax(0)}
    if meta['task'] == 'segmentation':
        return {'map': first['labels'][np.ix_(*(np.arange(n) * m // n for n, m in zip(size, used, strict=True)))]}
    limits, masks = np.array(used[::-1] * 2, 'f'), []
    boxes = first['dets'][:, :4].clip(0, limits) * (np.array(size[::-1] * 2, 'f') / limits)
    for mask, (x1, y1, x2, y2) in zip(first.get('masks', ()), boxes, strict=False):  # probabilities on the box
        y, x = mask.shape / np.maximum([y2 - y1, x2 - x1], 1e-6)
        window = [(1 - y1 * y, 1 + (size[0] - y1) * y), (1 - x1 * x, 1 + (size[1] - x1) * x)]
        masks.append(resize(np.pad(mask, 1), size, window=window) >= meta['thresholds']['mask'])
    return {'boxes': boxes, 'scores': first['dets'][:, 4], 'labels': first['labels'], 'masks': masks}


def write(image: np.ndarray, found: dict, meta: dict, stem: Path, least: float) -> None:
    """STEM.json, STEM_overlay.png and, where there are masks, STEM_labels.png; no instance below the least score."""
    if 'map' in found:  # a mask for each class that is there
        found['labels'] = np.unique(found['map'])
        found['masks'] = [found['map'] == c for c in found['labels']]
    elif meta['task'] == 'classification':
        found = {'labels': (top := found['scores'].argsort()[:-6:-1]), 'scores': found['scores'][top]}
    names, overlay, labels, entries = meta['classes'], Image.fromarray(image), np.zeros(image.shape[:2], np.uint16), []
    for k, c in enumerate(found['labels'][: sum(found['scores'] >= least) if 'boxes' in found else None]):  # in order
        color = tuple(meta['palette'][c]) if meta.get('palette') else (255, 64, 0)
        entry = {'class': names[c], 'label': k + 1 if 'boxes' in found else int(c)}
        entry |= {'score': round(float(found['scores'][k]), 4)} if 'scores' in found else {}
        if 'boxes' in found:
            entry['box'] = found['boxes'][k].round(1).tolist()
            ImageDraw.Draw(overlay).rectangle(entry['box'], outline=color)
        if found.get('masks'):
            mask = found['masks'][k] & (labels == 0)  # the better instance hides the others
            labels[mask], entry['pixels'] = entry['label'], int(mask.sum())
            overlay.paste(color, mask=Image.fromarray(mask * np.uint8(128)))
        ImageDraw.Draw(overlay).text(entry.get('box', (4, 12 * k))[:2], f'{names[c]} {entry.get("score", "")}', color)
        entries.append(entry)
    overlay.save(f'{stem}_overlay.png')
    if found.get('masks'):
        Image.fromarray(labels).save(f'{stem}_labels.png')
    Path(f'{stem}.json').write_text(json.dumps({'task': meta['task'], 'size': image.shape[1::-1], 'found': entries}))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', type=Path)
    parser.add_argument('--out-dir', type=Path, default=Path(), help='NAME_labels.png holds the "label"s of NAME.json')
    parser.add_argument('--score', type=float, default=0.3, help='least score of an instance (default: %(default)s)')
    args = parser.parse_args()
    file = Path(__file__).resolve().with_name('meta.json')
    try:
        import onnxruntime

        meta = json.loads(file.read_text(encoding='utf-8'))
        session = onnxruntime.InferenceSession(file.with_name(meta['file']), providers=['CPUExecutionProvider'])
        names = [output['name'] for output in meta['outputs']]
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for file in args.images:
            image = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert('RGB'))
            inputs, used = preprocess(image, meta)
            outputs = dict(zip(names, session.run(names, {meta['input']['name']: inputs}), strict=True))
            write(image, postprocess(outputs, meta, image.shape[:2], used), meta, args.out_dir / file.stem, args.score)
    except Exception as error:  # onnxruntime's have no other base
        reason = f'meta.json says nothing usable about {error}' if isinstance(error, KeyError) else error
        raise SystemExit(f'{file}: {type(error).__name__}: {reason}') from None
