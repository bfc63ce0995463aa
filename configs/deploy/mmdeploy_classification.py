# mmdeploy 1.3.1: a classifier for onnxruntime. See docs/deployment.md, which also says why to prefer tools/export.py.
onnx_config = dict(
    type='onnx',
    export_params=True,
    keep_initializers_as_inputs=False,
    opset_version=17,
    save_file='end2end.onnx',
    input_names=['input'],
    output_names=['output'],
    input_shape=None,
    dynamic_axes=dict(input={0: 'batch', 2: 'height', 3: 'width'}, output={0: 'batch'}),
    optimize=False,
)
codebase_config = dict(type='mmpretrain', task='Classification', module=['mmunireplknet'])
backend_config = dict(type='onnxruntime')
