"""The configs that are tried with UniRepLKNet, and the table of docs/compatibility.md that says so."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    ('Cascade Mask R-CNN', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', (32, 64), True),
    ('HTC without semantic', 'htc/htc-without-semantic_r50_fpn_1x_coco.py', (32, 64), True),
    ('ATSS', 'atss/atss_r50_fpn_1x_coco.py'),
    ('GFL', 'gfl/gfl_r50_fpn_1x_coco.py'),
    ('FCOS', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    ('RetinaNet', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
    ('TOOD', 'tood/tood_r50_fpn_1x_coco.py'),
    ('YOLOX (PAFPN)', 'yolox/yolox_tiny_8xb8-300e_coco.py', (128, 128)),
    ('Deformable DETR', 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'),
    ('DINO', 'dino/dino-4scale_r50_8xb2-12e_coco.py', (192, 256), True),
    ('Mask2Former', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'),
    ('SOLOv2', 'solov2/solov2_r50_fpn_1x_coco.py', (64, 64), True),
    ('RTMDet-Ins', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', (128, 128)),
    ('Sparse R-CNN', 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', (64, 64), True),
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

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'compatibility.md'
WRITE = 'MMUNI_WRITE_COMPATIBILITY'
HEADINGS = {'onedl-mmengine': '## Maintained forks', 'mmengine': '## Original packages'}
PACKAGES = {
    'onedl-mmengine': ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain'],
    'mmengine': ['mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'],
}
TITLE = '| library | head | config | built | trained | predicted | deployed |\n|---|---|---|---|---|---|---|'


def family() -> str:
    """Which of the two dependency families is installed, by the name of its mmengine."""
    try:
        version('onedl-mmengine')
    except PackageNotFoundError:
        return 'mmengine'
    return 'onedl-mmengine'


def section(of: str) -> list[str]:
    """Lines of the page below the family's heading."""
    return PAGE.read_text().split(HEADINGS[of] + '\n')[1].split('\n## ')[0].strip().splitlines()


def rows(of: str) -> dict[tuple[str, str], str]:
    """The family's lines on the page by library and config."""
    found = {}
    for line in section(of):
        if line.startswith('| mm'):
            library, _, config = (cell.strip() for cell in line.split('|')[1:4])
            found[library, config.strip('`')] = line
    return found


def line_of(row: Row, cells: list[str]) -> str:
    """The row's line on the page."""
    return f'| {" | ".join([row.library, row.head, f"`{row.config}`", *cells])} |'


def write(row: Row, line: str) -> None:
    """Put the line into the section of the installed family, in the order of ``ROWS``, with today's versions."""
    import torch

    of = family()
    lines = {**rows(of), (row.library, row.config): line}
    versions = ', '.join(f'{package} {version(package)}' for package in PACKAGES[of])
    ordered = [lines[r.library, r.config] for r in ROWS if (r.library, r.config) in lines]
    text = f'{versions}, torch {torch.__version__.partition("+")[0]} on a CPU.'
    old = '\n'.join(section(of))
    new = '\n'.join([text, '', TITLE, *ordered])
    PAGE.write_text(PAGE.read_text().replace(f'{HEADINGS[of]}\n\n{old}', f'{HEADINGS[of]}\n\n{new}'))


def record(row: Row, cells: list[str]) -> None:
    """Compare what was seen with the page, or write it there where the environment asks for that."""
    line = line_of(row, cells)
    if os.environ.get(WRITE):
        write(row, line)
    committed = rows(family()).get((row.library, row.config))
    assert committed == line, f'{PAGE.name} says {committed}; run this file with {WRITE}=1 to write what was seen'
