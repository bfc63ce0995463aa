# CheckpointFitHook lets --cfg-options load_from=FILE take published classification files.
_base_ = './runtime.py'
custom_hooks = [dict(type='RandomStateHook'), dict(type='CheckpointFitHook')]
