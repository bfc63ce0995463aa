# What detection adds to the runtime of all tasks.
_base_ = './runtime.py'
env_cfg = dict(cudnn_benchmark=False)  # as published: every image has another size
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='AtomicCheckpointHook',
        interval=1,
        max_keep_ckpts=5,
        save_last=True,
        # What the published 'auto' meant in mmdet 2. In mmdet 3 it is the first entry of the metrics, which beside
        # classwise=True is the precision of the class 'person'.
        save_best='coco/bbox_mAP',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
