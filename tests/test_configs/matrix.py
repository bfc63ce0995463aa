"""The configs of mmdet, mmseg and mmpretrain that are tried with UniRepLKNet, as they are shipped."""

from .any_config import Row

SEG = [
    ('UPerHead', 'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'),
    ('FCN', 'fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py'),
    ('PSPNet', 'pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py'),
    ('DeepLabV3+', 'deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py'),
    ('OCRNet', 'ocrnet/ocrnet_hr18_4xb4-160k_ade20k-512x512.py'),
    ('Mask2Former', 'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'),
    ('SegFormer head', 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'),
    ('PointRend', 'point_rend/pointrend_r50_4xb4-160k_ade20k-512x512.py'),
    ('K-Net', 'knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py'),
    ('Semantic FPN', 'sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'),
    ('DNLNet', 'dnlnet/dnl_r50-d8_4xb4-160k_ade20k-512x512.py'),
    ('ISANet', 'isanet/isanet_r50-d8_4xb4-160k_ade20k-512x512.py'),
]
DET = [
    ('Faster R-CNN', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', (32, 64)),
    ('Mask R-CNN', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', (32, 64)),
    ('Cascade R-CNN', 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', (32, 64)),
    ('Cascade Mask R-CNN', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', (32, 64)),
    ('HTC without semantic', 'htc/htc-without-semantic_r50_fpn_1x_coco.py', (32, 64)),
    ('ATSS', 'atss/atss_r50_fpn_1x_coco.py'),
    ('GFL', 'gfl/gfl_r50_fpn_1x_coco.py'),
    ('FCOS', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    ('RetinaNet', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
    ('TOOD', 'tood/tood_r50_fpn_1x_coco.py'),
    ('YOLOX (PAFPN)', 'yolox/yolox_tiny_8xb8-300e_coco.py'),
    ('Deformable DETR', 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'),
    ('DINO', 'dino/dino-4scale_r50_8xb2-12e_coco.py', (192, 256)),
    ('Mask2Former', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'),
    ('SOLOv2', 'solov2/solov2_r50_fpn_1x_coco.py'),
    ('RTMDet-Ins', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'),
    ('Sparse R-CNN', 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py'),
]
CLS = [
    ('linear head', 'resnet/resnet50_8xb32_in1k.py'),
    ('linear head on a pooled feature', 'convnext/convnext-tiny_32xb128_in1k.py'),
    ('multi-label (CSRA)', 'csra/resnet101-csra_1xb16_voc07-448px.py'),
    ('ArcFace', 'arcface/resnet50-arcface_8xb32_inshop.py'),
    ('SimCLR', 'simclr/simclr_resnet50_8xb32-coslr-200e_in1k.py'),
    ('MoCo v2', 'mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py'),
]

ROWS = [Row(library, *row) for library, rows in dict(mmdet=DET, mmseg=SEG, mmpretrain=CLS).items() for row in rows]
