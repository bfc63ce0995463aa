"""A signal after OpenVINO's plugins have gone, in the order in which they came, finds a stack to run on."""

import subprocess
import sys

import pytest

from .tiny_onnx import classifier

PROGRAM = """
import signal, subprocess, sys
from mmunireplknet.deploy.formats import open_exported

signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's data loader has it
first, second = (open_exported(sys.argv[1], format='openvino') for _ in range(2))
del first
del second
subprocess.run([sys.executable, '-c', ''], check=True)
"""


@pytest.mark.slow
def test_a_child_that_ends_kills_nobody(tmp_path):
    pytest.importorskip('openvino')
    file = classifier(tmp_path / 'model') / 'model.onnx'
    done = subprocess.run([sys.executable, '-c', PROGRAM, str(file)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, '')
