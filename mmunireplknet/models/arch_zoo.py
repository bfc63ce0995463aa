"""The nine published UniRepLKNet variants and the published weight files, as data.

Sources: UniRepLKNet, https://arxiv.org/abs/2311.15599 (CVPR 2024), and its extension
https://arxiv.org/abs/2410.08049 (TPAMI 2025); code and weights under Apache-2.0 at
https://github.com/AILab-CVC/UniRepLKNet and https://huggingface.co/DingXiaoH/UniRepLKNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ['ARCHS', 'CHECKPOINTS', 'Arch', 'PublishedCheckpoint', 'get_arch', 'identify_arch']

HOST = 'https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/'
PAGE = 'https://huggingface.co/DingXiaoH/UniRepLKNet'


@dataclass(frozen=True)
class Arch:
    """Shape of one variant.

    Attributes:
        depths: Blocks of each of the four stages.
        dims: Channels of each stage.
        kernel_sizes: Kernel size of the depthwise convolution of every block, stage by stage.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]


def _published(base_dim: int, depths: tuple[int, ...], stage3: tuple[int, ...]) -> Arch:
    """A variant by its rule: 3x3 in stage 1, 13x13 in stages 2 and 4, a repeated pattern in stage 3."""
    dims = tuple(base_dim * 2**i for i in range(4))
    pattern = stage3 * (depths[2] // len(stage3))
    return Arch(depths, dims, ((3,) * depths[0], (13,) * depths[1], pattern, (13,) * depths[3]))


ARCHS: Mapping[str, Arch] = MappingProxyType(
    {
        'a': _published(40, (2, 2, 6, 2), (13,)),
        'f': _published(48, (2, 2, 6, 2), (13,)),
        'p': _published(64, (2, 2, 6, 2), (13,)),
        'n': _published(80, (2, 2, 8, 2), (13,)),
        't': _published(80, (3, 3, 18, 3), (13, 3)),
        's': _published(96, (3, 3, 27, 3), (13, 3, 3)),
        'b': _published(128, (3, 3, 27, 3), (13, 3, 3)),
        'l': _published(192, (3, 3, 27, 3), (13, 3, 3)),
        'xl': _published(256, (3, 3, 27, 3), (13, 3, 3)),
    }
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One published weight file; all are in the training form.

    Attributes:
        file: Name of the file at its host.
        arch: Key of ``ARCHS``.
        task: ``'classification'``, ``'segmentation'`` or ``'detection'``.
        figure: Published result with its metric, as in the file's name, for orientation (not measured by this
            project). The authors' tables round it, and say 54.5 for UperNet-L whose file says 54.70.
        sha256: First digits of the file's SHA-256 where they are known, else empty.
    """

    file: str
    arch: str
    task: str
    figure: str
    sha256: str = ''

    @property
    def url(self) -> str:
        """Address that serves the file."""
        return HOST + self.file


def _zoo() -> dict[str, PublishedCheckpoint]:
    zoo = {}

    def add(name: str, *args: str) -> None:
        zoo[name] = PublishedCheckpoint(*args)

    cls, seg, det = 'classification', 'segmentation', 'detection'
    for arch, accuracy, digest in (
        ('a', '77.03', 'a0ef11d8'),
        ('f', '78.58', ''),
        ('p', '80.23', '36363a5d'),
        ('n', '81.64', ''),
        ('t', '83.21', ''),
        ('s', '83.91', ''),
    ):
        add(f'unireplknet_{arch}_in1k', f'unireplknet_{arch}_in1k_224_acc{accuracy}.pth', arch, cls,
            f'ImageNet-1K top-1 {accuracy} at 224', digest)  # fmt: skip
    for arch, accuracy, pretrain_digest, digest in (
        ('s', '86.44', '0ce55607', '120fd52a'),
        ('b', '87.40', '', ''),
        ('l', '87.88', '', ''),
        ('xl', '87.96', '', 'a5fb3d98'),
    ):
        add(f'unireplknet_{arch}_in22k', f'unireplknet_{arch}_in22k_pretrain.pth', arch, cls,
            'ImageNet-22K pre-training, 21,841 classes', pretrain_digest)  # fmt: skip
        add(f'unireplknet_{arch}_in22k_in1k-384', f'unireplknet_{arch}_in22k_to_in1k_384_acc{accuracy}.pth',
            arch, cls, f'ImageNet-1K top-1 {accuracy} at 384', digest)  # fmt: skip
    for arch, data, crop, miou, digest in (
        ('t', '', '512', '48.56', ''),
        ('s', '', '512', '50.46', 'f1be06da'),
        ('s', '-in22k', '512', '51.86', '67efb249'),
        ('s', '-in22k', '640', '52.28', '93486eca'),
        ('b', '-in22k', '640', '53.52', 'fbcc4644'),
        ('l', '-in22k', '640', '54.70', 'bc945a46'),
        ('xl', '-in22k', '640', '55.18', 'c69d8f97'),
    ):
        name = f'upernet_unireplknet_{arch}{data}_ade20k' + (f'-{crop}' if data else '')
        file = f'upernet_unireplknet_{arch}{data.replace("-", "_")}_{crop}_160k_ade20k_miou{miou}.pth'
        add(name, file, arch, seg, f'ADE20K mIoU {miou} single-scale, crop {crop}', digest)
    for arch, data, box_ap, digest in (
        ('t', '', '51.75', '6dabd709'),
        ('s', '', '52.95', '364fe729'),
        ('s', '-in22k', '54.27', 'ea589d98'),
        ('b', '-in22k', '54.78', '38568b8d'),
        ('l', '-in22k', '55.82', '97078954'),
        ('xl', '-in22k', '56.39', 'dca404c4'),
    ):
        source = data.replace('-', '_') or '_in1k'
        file = f'casc_mask_rcnn_unireplknet_{arch}{source}_3x_coco_ap{box_ap}.pth'
        add(
            f'cascade-mask-rcnn_unireplknet_{arch}{data}_coco',
            file,
            arch,
            det,
            f'COCO box AP {box_ap}',
            digest,
        )
    return zoo


CHECKPOINTS: Mapping[str, PublishedCheckpoint] = MappingProxyType(_zoo())
"""Published files by the short name that ``init_cfg`` and ``load_checkpoint`` accept."""


def get_arch(arch: str | Mapping, kernel_sizes: int | Sequence | None = None) -> Arch:
    """Resolve an ``arch`` argument.

    Args:
        arch: Name of a published variant in any case, or a dict with ``depths`` and ``dims`` and, unless
            ``kernel_sizes`` is given, ``kernel_sizes``.
        kernel_sizes: Replaces the variant's. An int for all blocks, or one entry a stage, each an int or as many
            ints as the stage has blocks.

    Raises:
        ValueError: Unknown name, missing or unknown dict entries, or lengths that do not fit.
    """
    if isinstance(arch, str):
        if arch.lower() not in ARCHS:
            raise ValueError(
                f'arch={arch!r} is not a published variant. Expected one of {", ".join(ARCHS)}, '
                "or a dict(depths=(...), dims=(...), kernel_sizes=(...)) for one's own."
            )
        named = ARCHS[arch.lower()]
        depths, dims = named.depths, named.dims
        default: int | Sequence | None = named.kernel_sizes
    elif isinstance(arch, Mapping):
        unknown = set(arch) - {'depths', 'dims', 'kernel_sizes'}
        missing = {'depths', 'dims'} - set(arch)
        if unknown or missing:
            raise ValueError(
                f'arch has the keys {sorted(arch)}: missing {sorted(missing)}, unknown {sorted(unknown)}. '
                'Expected depths and dims, and kernel_sizes unless it is given beside arch.'
            )
        depths, dims, default = tuple(arch['depths']), tuple(arch['dims']), arch.get('kernel_sizes')
    else:
        raise TypeError(f'arch must be a name or a dict, not {type(arch).__name__}: {arch!r}')
    if len(depths) != 4 or len(dims) != 4:
        raise ValueError(f'arch needs four depths and four dims, got depths={depths}, dims={dims}.')
    if any(d < 1 for d in depths) or any(d < 4 or d % 2 for d in dims):
        raise ValueError(f'depths must be positive and dims even and at least 4, got depths={depths}, dims={dims}.')
    sizes = kernel_sizes if kernel_sizes is not None else default
    if sizes is None:
        raise ValueError('kernel_sizes is missing: a dict arch has no default. Give an int or one entry a stage.')
    return Arch(depths, dims, _expand_kernel_sizes(sizes, depths))


def _expand_kernel_sizes(sizes: int | Sequence, depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if not isinstance(sizes, (list, tuple)):
        sizes = (sizes,) * len(depths)
    expected = f'Expected an int, {len(depths)} entries (one a stage), each an int or one int a block of {depths}.'
    if len(sizes) != len(depths):
        raise ValueError(f'kernel_sizes={sizes!r} has {len(sizes)} entries. {expected}')
    stages = []
    for entry, depth in zip(sizes, depths, strict=True):
        stage = tuple(entry) if isinstance(entry, (list, tuple)) else (entry,) * depth
        if len(stage) != depth:
            raise ValueError(f'kernel_sizes={sizes!r}: {len(stage)} sizes for a stage of {depth} blocks. {expected}')
        for size in stage:
            if not isinstance(size, int) or size % 2 == 0 or not 3 <= size <= 31:
                raise ValueError(f'kernel size {size!r} is not supported: it must be odd, from 3 to 31.')
        stages.append(stage)
    return tuple(stages)


def identify_arch(shape: Arch) -> str:
    """Name of the published variant with this shape, or a description of the shape."""
    for name, known in ARCHS.items():
        if known == shape:
            return f'UniRepLKNet-{name.upper()}'
    kernels = '/'.join(','.join(map(str, sorted(set(stage)))) for stage in shape.kernel_sizes)
    return f'a custom UniRepLKNet with depths {shape.depths}, dims {shape.dims}, kernels {kernels} by stage'
