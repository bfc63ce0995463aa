# mmdeploy 1.3.1: Mask and Cascade Mask R-CNN for onnxruntime. Opset 16 is the first with the RoIAlign of mmdet.
axes = dict(dets={0: 'batch', 1: 'num_dets'}, labels={0: 'batch', 1: 'num_dets'}, masks={0: 'batch', 1: 'num_dets'})
onnx_config = dict(
    type='onnx',
    export_params=True,
    keep_initializers_as_inputs=False,
    opset_version=16,
    save_file='end2end.onnx',
    input_names=['input'],
    output_names=['dets', 'labels', 'masks'],
    input_shape=None,
    dynamic_axes=dict(input={0: 'batch', 2: 'height', 3: 'width'}, **axes),
    optimize=False,
)
post_processing = dict(
    score_threshold=0.05, confidence_threshold=0.005, iou_threshold=0.5, max_output_boxes_per_class=200,
    pre_top_k=5000, keep_top_k=100, background_label_id=-1, export_postprocess_mask=False,
)  # fmt: skip
codebase_config = dict(
    type='mmdet', task='ObjectDetection', model_type='end2end', post_processing=post_processing,
    module=['mmunireplknet'],
)  # fmt: skip
backend_config = dict(type='onnxruntime')
