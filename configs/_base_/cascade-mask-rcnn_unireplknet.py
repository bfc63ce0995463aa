# Cascade Mask R-CNN as published, without what depends on the variant: arch, drop path, checkpoint, channels.
# What is not written here is mmdet's own: FPN to 256 channels, RPN, RoIAlign, mask heads, assigners, samplers, NMS.
# One small GPU: nothing has to change, because mmengine turns SyncBN into BN outside of distributed training; the
# learning rate follows the batch by --auto-scale-lr. More in docs/detection.md.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'
default_scope = 'mmdet'
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type='UniRepLKNet',
        out_indices=(0, 1, 2, 3),
        with_cp=True,  # as published, to save memory
        norm_cfg=norm_cfg,
    ),
    roi_head=dict(
        bbox_head=[
            dict(
                type='ConvFCBBoxHead',
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=target_stds),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=norm_cfg,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for target_stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
    ),
)
