"""UniRepLKNet for OpenMMLab 2.x. Importing this package registers everything it brings.

This is what a config names: ``custom_imports = dict(imports=['mmunireplknet'], allow_failed_imports=False)``.
"""

__version__ = '0.1.0'

from . import compat

compat.ensure_torchvision()
compat.install_safe_loading()
compat.let_fsdp_resume()
compat.let_mmdeploy_export()

from . import engine  # noqa: E402
from .models import CheckpointError, UniRepLKNet, load_checkpoint, switch_to_deploy  # noqa: E402

__all__ = ['CheckpointError', 'UniRepLKNet', '__version__', 'engine', 'load_checkpoint', 'switch_to_deploy']
