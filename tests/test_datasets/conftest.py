"""ADE20K in small."""

import numpy as np
import pytest
from PIL import Image

EXPECTED = {'training': 3, 'validation': 2}


def make(root, labels=(0, 150)):
    rng = np.random.default_rng(0)
    for split, count in EXPECTED.items():
        for folder in ('images', 'annotations'):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 256, (6, 8, 3), np.uint8)
            mask = rng.choice(labels, (6, 8)).astype(np.uint8)
            mask[0, 0] = labels[-1]
            Image.fromarray(image).save(root / 'images' / split / f'ADE_{index}.jpg')
            Image.fromarray(mask).save(root / 'annotations' / split / f'ADE_{index}.png')
    return root


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / 'ade/ADEChallengeData2016')
