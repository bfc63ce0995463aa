# The published averaging of weights (ExpMomentumEMAHook of mmdet 2): momentum 1e-4 after a warm-up with a time constant
# of 2000 iterations, of the BN statistics too. Validation, testing and the state_dict of checkpoints take the average.
_base_ = './runtime_coco.py'
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=1e-4, gamma=2000, update_buffers=True, priority=49),
    dict(type='RandomStateHook'),
]
