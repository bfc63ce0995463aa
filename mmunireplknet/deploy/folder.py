"""The folder that an export leaves: all of it or nothing, and what is in it besides the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .exportable import ExportError

__all__ = ['build_folder', 'check_folder', 'readme', 'write_json']


def check_folder(out_dir: Path, overwrite: bool) -> None:
    """Refuse what must not be replaced.

    Raises:
        ExportError: ``out_dir`` is there, and either not to be overwritten or not the folder of an export.
    """
    if not out_dir.exists() and not out_dir.is_symlink():
        return
    if not out_dir.is_dir() or out_dir.is_symlink():
        raise ExportError(f'{out_dir} is there and no folder: name another one.')
    names = {path.name for path in out_dir.iterdir()}
    if names and not overwrite:
        raise ExportError(f'{out_dir} is there and not empty: name another folder, or overwrite it (--overwrite).')
    if names and 'meta.json' not in names:
        raise ExportError(f'{out_dir} is no folder of an export, since it has no meta.json: it is not overwritten.')


@contextmanager
def build_folder(out_dir: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out_dir`` that takes its place when all went well, and is deleted otherwise.

    Raises:
        ExportError: See ``check_folder``; or nothing can be written there.
    """
    out_dir = out_dir.absolute()
    check_folder(out_dir, overwrite)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{out_dir.name}-', dir=out_dir.parent))
    except OSError as error:
        raise ExportError(f'nothing can be written to {out_dir.parent} ({error.strerror}): name another.') from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's are for the owner alone
        _replace(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(new: Path, out_dir: Path) -> None:
    """Rename ``new`` to ``out_dir``; a folder that is there is moved out of the way first and back on failure."""
    if not out_dir.exists():
        new.rename(out_dir)
        return
    old = Path(tempfile.mkdtemp(prefix=f'.{out_dir.name}-old-', dir=out_dir.parent))
    out_dir.rename(old)  # onto the empty folder
    try:
        new.rename(out_dir)
    except BaseException:
        old.rename(out_dir)
        raise
    shutil.rmtree(old)


def write_json(values: Mapping[str, Any], file: Path) -> None:
    """Write ``values`` for people to read, too: a list of numbers or words stands in one line."""
    text = json.dumps(values, indent=2)
    text = re.sub(r'\[\n\s+([^][{}]*?)\n\s+\]', lambda found: f'[{re.sub(chr(10) + " +", " ", found[1])}]', text)
    file.write_text(text + '\n')


HOW_TO_RUN = {
    'model.onnx': """\
    python run.py IMAGE... --out-dir out   # numpy, onnxruntime and pillow are all it needs

or, on a tensor that is preprocessed already:

    import numpy, onnxruntime
    session = onnxruntime.InferenceSession('model.onnx')
    outputs = session.run(None, {'input': numpy.zeros((1, 3, 256, 256), numpy.float32)})
""",
    'model.xml': """\
    import numpy, openvino
    model = openvino.Core().compile_model('model.xml', 'CPU')
    outputs = model(numpy.zeros((1, 3, 256, 256), numpy.float32))
""",
    'model.torchscript.pt': """\
    import torch
    outputs = torch.jit.load('model.torchscript.pt')(torch.zeros(1, 3, 256, 256))
""",
    'model.pt2': """\
    import torch
    outputs = torch.export.load('model.pt2').module()(torch.zeros(1, 3, 256, 256))
""",
    'model.safetensors': """\
    from safetensors.torch import load_file
    state_dict = load_file('model.safetensors')   # of the model in deploy form
""",
}

TENSORRT = """
## TensorRT

On a machine with a GPU and TensorRT (10 or newer), in this folder:

    {command}

The types in the ONNX file are kept (strongly typed): GRN and LayerNorm reduce in float32 in a model in float16, too.
`tools/build_engine.py` of the package does the same and compares the engine with onnxruntime.
"""


INT8 = """

It was then quantized: convolutions and linear layers compute in int8, in ranges from {calibration_images} calibration
images; GRN, LayerNorm and SE stay in float. report.md says what that costs. `deploy.pth` holds the float weights."""


def readme(meta: Mapping[str, Any], worst: float, command: str = '') -> str:
    """README.md of the folder.

    Args:
        meta: What is in meta.json.
        worst: Largest relative difference that was measured.
        command: Builds a TensorRT engine; '' if there is none for this format.
    """
    shape = ', '.join('any' if n is None else str(n) for n in meta['input']['shape'])
    outputs = '\n'.join(
        f'- `{o["name"]}` ({", ".join("any" if n is None else str(n) for n in o["shape"])}): {o["meaning"]}'
        for o in meta['outputs']
    )
    weights = f' Its weights are in `{meta["data"]}`, which has to stay beside it.' if meta.get('data') else ''
    example = HOW_TO_RUN[meta['file']]
    if command:
        example += TENSORRT.format(command=command)
    if meta['input']['shape'][2] is not None:
        example = example.replace('1, 3, 256, 256', ', '.join(map(str, meta['input']['shape'])))
    int8 = INT8.format(**meta['int8']) if 'int8' in meta else ''
    return f"""# {Path(meta['config']).stem}: {meta['task']}

Exported by {meta['package']} from `{meta['config']}`, reparameterized. Largest relative difference from the model it
was made of: {worst:.1e} (report.md).{int8}

- `{meta['file']}`: the model. Input `input` ({shape}), float32, {meta['input']['channels']}, normalized.{weights}
- `meta.json`: classes, palette, and how an image becomes the input (sizes are height, width; `scale` is width, height;
  mean and std are of values from 0 to 255; padding is added below and to the right, after normalizing).
- `deploy.pth`: the same weights as a PyTorch checkpoint for the config with `model.backbone.deploy=True`.
- `report.json`, `report.md`: how far the exported model is from the original, and how fast.

## Run it

{example}
## Outputs

{outputs}
"""
