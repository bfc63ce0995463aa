# mmdet's Mask R-CNN with a small pyramid and small heads, trained from scratch on two CPU cores in minutes. The
# backbone is in the config of each model.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './demo_runtime.py']
default_scope = 'mmdet'
custom_imports = dict(imports=['mmunireplknet'], allow_failed_imports=False)
_norm = dict(type='BN')
_levels = dict(out_channels=64, featmap_strides=[4, 8, 16], finest_scale=28)  # a box of 28 pixels is at stride 4
# One sample a bin is enough for boxes of so few pixels: mmcv's RoIAlign runs on one thread of the CPU.
_roi_align = dict(sampling_ratio=1)
_proposals = dict(nms_pre=500, max_per_img=300)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    neck=dict(out_channels=64, num_outs=4, norm_cfg=_norm),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(**_levels, roi_layer=_roi_align),
        bbox_head=dict(
            in_channels=64,
            fc_out_channels=256,
            # mmdet's standard deviations of 0.01 and 0.001 are for pretrained backbones.
            init_cfg=[
                dict(type='Normal', std=0.05, override=dict(name='fc_cls')),
                dict(type='Normal', std=0.01, override=dict(name='fc_reg')),
                dict(type='Xavier', distribution='uniform', override=dict(name='shared_fcs')),
            ],
        ),
        mask_roi_extractor=dict(**_levels, roi_layer=_roi_align),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, norm_cfg=_norm),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=_proposals,
        rcnn=dict(sampler=dict(num=48)),
    ),
    test_cfg=dict(rpn=_proposals),
)
default_hooks = dict(visualization=dict(type='DetVisualizationHook'))
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
