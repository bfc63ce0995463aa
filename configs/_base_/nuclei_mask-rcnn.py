# Nuclei of the 2018 Data Science Bowl (stage 1; BBBC038), 240 microscope images to train on, from scratch on two CPU
# cores in half an hour: the detection demo's model on images of twice the size, since half of the nuclei are smaller
# than 16 pixels. The data set lies in data/nuclei as COCO has it: {train,val}/*.png, annotations/{train,val}.json.
_base_ = './demo_mask-rcnn.py'
data_root = 'data/nuclei/'
_load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
train_pipeline = [
    *_load,
    dict(
        type='RandomChoice',
        transforms=[[dict(type='Resize', scale_factor=factor, keep_ratio=True)] for factor in (1.5, 2.0, 2.5)],
    ),
    dict(type='RandomCrop', crop_size=(320, 320)),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=2.0, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
_dataset = dict(type='CocoDataset', data_root=data_root, metainfo=dict(classes=['nucleus'], palette=[[220, 20, 60]]))
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **_dataset, ann_file='annotations/train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **_dataset,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=f'{data_root}annotations/val.json', metric=['bbox', 'segm'])
test_evaluator = val_evaluator
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rcnn=dict(max_per_img=200)),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=4000),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4000, val_interval=500)
auto_scale_lr = dict(enable=False, base_batch_size=2)
default_hooks = dict(checkpoint=dict(interval=500))
