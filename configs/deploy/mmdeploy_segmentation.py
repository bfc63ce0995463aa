# mmdeploy 1.3.1: a segmentor for onnxruntime, of one size: its graph of UperNet's pooling is of that size alone.
onnx_config = dict(
    type='onnx',
    export_params=True,
    keep_initializers_as_inputs=False,
    opset_version=17,
    save_file='end2end.onnx',
    input_names=['input'],
    output_names=['output'],
    input_shape=(512, 512),  # width, height
    optimize=False,
)
codebase_config = dict(type='mmseg', task='Segmentation', with_argmax=True, module=['mmunireplknet'])
backend_config = dict(type='onnxruntime')
