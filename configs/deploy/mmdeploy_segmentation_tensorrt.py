# mmdeploy 1.3.1: a segmentor for the TensorRT that it knows (8). Its fp16_mode would let GRN overflow; not verified.
_base_ = './mmdeploy_segmentation.py'
shapes = dict(min_shape=[1, 3, 512, 512], opt_shape=[1, 3, 512, 512], max_shape=[1, 3, 512, 512])
backend_config = dict(
    _delete_=True,
    type='tensorrt',
    common_config=dict(fp16_mode=False, max_workspace_size=1 << 30),
    model_inputs=[dict(input_shapes=dict(input=shapes))],
)
