# The published classifier: trunk with pooled final norm and a linear head. Variants add arch, drop path and channels.
# Keys are those of the published files but for "backbone." before the trunk and "head.fc" for their "head".
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='UniRepLKNet', out_indices=(3,), gap_before_final_norm=True),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
    # One of the two for each batch, evenly: as published (mixup probability 1, switch probability 0.5).
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
