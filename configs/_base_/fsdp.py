# Weights, gradients and optimizer sharded over the processes (docs/training.md), for variants that do not fit one GPU:
#   _base_ = ['./upernet_unireplknet_xl-in22k_ade20k-640.py', './_base_/fsdp.py']
# Start it by tools/dist_train.sh or tools/slurm_train.sh. One small GPU: this saves nothing there.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    state_dict_cfg='full',  # checkpoints as without FSDP: one file, whole tensors
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,  # LayerDecayOptimWrapperConstructor asks for it
        auto_wrap_policy='every_block',
    ),
)
