# Shared by all tasks. One small GPU: nothing to change here. Several GPU processes without NCCL (Windows) need
# --cfg-options env_cfg.dist_cfg.backend=gloo; on the CPU the tools choose gloo themselves.
custom_imports = dict(imports=['mmunireplknet'], allow_failed_imports=False)
custom_hooks = [dict(type='RandomStateHook')]
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
log_level = 'INFO'
load_from = None
resume = False
