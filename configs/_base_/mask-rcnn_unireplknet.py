# mmdet's Mask R-CNN on the small variants, for one GPU: BN, no activation checkpointing. Not published.
# Where memory is short: --cfg-options model.backbone.with_cp=True, or tools/train.py --amp.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
default_scope = 'mmdet'
model = dict(
    backbone=dict(_delete_=True, type='UniRepLKNet', out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN')),
)
