# CamVid, 367 street scenes to train on, from scratch on two CPU cores in half an hour: the demo's head and optimizer.
# The data set lies in data/camvid; another place: --cfg-options data_root=PLACE
_base_ = './demo_upernet.py'
data_root = 'data/camvid'
_classes = ['sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist']
_palette = [
    [128, 128, 128],
    [128, 0, 0],
    [192, 192, 128],
    [128, 64, 128],
    [60, 40, 222],
    [128, 128, 0],
    [192, 128, 128],
]
_palette += [[64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]]
void = 11  # the label of what belongs to no class; neither trained nor counted
crop_size = (256, 320)
_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
train_pipeline = [
    *_pipeline,
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.6, 1.4), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75, ignore_index=void),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [*_pipeline, dict(type='PackSegInputs')]
_dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=_classes, palette=_palette),
    reduce_zero_label=False,
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        _delete_=True,
        **_dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        _delete_=True,
        **_dataset,
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ignore_index=void)
test_evaluator = val_evaluator
model = dict(
    data_preprocessor=dict(seg_pad_val=void, size=crop_size),
    decode_head=dict(
        num_classes=11,
        ignore_index=void,
        loss_decode=dict(_delete_=True, type='CrossEntropyLoss'),
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=4500),
]
train_cfg = dict(max_iters=4500, val_interval=500)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(checkpoint=dict(interval=500))
