"""A few noise images with boxes and masks in COCO's format, and a small Mask R-CNN for them."""

import json
from pathlib import Path

import mmcv
import numpy as np

SIZE = (48, 64)  # height, width
NAMES = ('square', 'bar')
ARCH = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), kernel_sizes=((3,), (7,), (7,), (3,)))
FILE = 'annotations/instances_{}.json'


def entry(number, image):
    """An annotation, in turn with polygons and with run lengths."""
    x, y, width, height = 4 + number, 6, 20, 24
    mask = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    if number % 2:  # columns, from the top: until the box, then the box and what is between its columns
        inside = [height, SIZE[0] - height] * width
        before, after = x * SIZE[0] + y, SIZE[0] * (SIZE[1] - x - width) - y
        mask = dict(size=list(SIZE), counts=[before, *inside[:-1], inside[-1] + after])
    return dict(
        id=number + 1, image_id=image, category_id=number % 2 + 1, bbox=[x, y, width, height], area=width * height,
        iscrowd=0, segmentation=mask,
    )  # fmt: skip


def generate(root, train=4, val=2, splits=('train2017', 'val2017')):
    """Write images and annotation files as COCO 2017 has them; returns ``root``."""
    rng = np.random.RandomState(0)
    for split, count in zip(splits, (train, val), strict=True):
        images, annotations = [], []
        for number in range(count):
            name = f'{number:012d}.jpg'
            mmcv.imwrite(rng.randint(0, 256, (*SIZE, 3), np.uint8), str(Path(root, split, name)))
            images.append(dict(id=number + 1, file_name=name, height=SIZE[0], width=SIZE[1]))
            annotations += [entry(2 * number + i, number + 1) for i in range(2)]
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(NAMES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        file = Path(root, FILE.format(split))
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return Path(root)


def edit(root, change, split='train2017'):
    """Let ``change`` change the content of an annotation file in place; returns the file."""
    file = Path(root, FILE.format(split))
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def config(file, root, **more):
    """Write the config of a small Mask R-CNN, two iterations from scratch and a test; returns its path."""
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='PackDetInputs'),
    ]

    def loader(split, **options):
        return dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CocoDataset',
                data_root=f'{root}/',
                ann_file=FILE.format(split),
                data_prefix=dict(img=f'{split}/'),
                metainfo=dict(classes=list(NAMES)),
                pipeline=pipeline,
                **options,
            ),
        )

    width = 16
    roi_head = dict(
        bbox_roi_extractor=dict(out_channels=width),
        mask_roi_extractor=dict(out_channels=width),
        bbox_head=dict(num_classes=len(NAMES), in_channels=width, fc_out_channels=width),
        mask_head=dict(num_classes=len(NAMES), in_channels=width, conv_out_channels=width, num_convs=1),
    )
    model = dict(
        backbone=dict(_delete_=True, type='UniRepLKNet', arch=ARCH),
        neck=dict(in_channels=list(ARCH['dims']), out_channels=width),
        rpn_head=dict(in_channels=width, feat_channels=width),
        roi_head=roi_head,
    )
    values = dict(
        custom_imports=dict(imports=['mmunireplknet']),
        default_scope='mmdet',
        model=model,
        train_dataloader=loader('train2017', filter_cfg=dict(filter_empty_gt=True)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=100),
        test_dataloader=loader('val2017'),
        test_cfg=dict(type='TestLoop'),
        test_evaluator=dict(type='CocoMetric', ann_file=f'{root}/{FILE.format("val2017")}'),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False, max_keep_ckpts=1),
            logger=dict(type='LoggerHook', interval=1),
        ),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        randomness=dict(seed=0),
    )
    values.update(more)
    lines = ["_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'", *(f'{k} = {v!r}' for k, v in values.items())]
    Path(file).write_text('\n'.join(lines))
    return Path(file)
