"""As much of TensorRT's Python interface as tensorrt_engine.py calls; an engine is the ONNX file, run by onnxruntime.

Every call is recorded, and what the real package refuses, is refused: a flag that is not a bit mask, inputs without an
address, outputs without memory. ``REAL_NAMES`` is what is taken for granted of the real package.
"""

import ctypes
from contextlib import nullcontext
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime

NUMPY = {'tensor(float)': np.float32, 'tensor(int64)': np.int64}


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1  # 0 in TensorRT 11, where it is ignored


class BuilderFlag(Enum):
    TF32 = 'TF32'


class TensorIOMode(Enum):
    INPUT, OUTPUT = 'INPUT', 'OUTPUT'


class IOutputAllocator:
    pass


def install(monkeypatch, module, error=None, spoil=None):
    """Put the fake, and a GPU that is the CPU, where ``module`` looks for them.

    Args:
        monkeypatch: The fixture.
        module: mmunireplknet.deploy.tensorrt_engine.
        error: What the parser says of the file.
        spoil: Changes the outputs of the engine.

    Returns:
        The list of calls: name and arguments.
    """
    calls = []

    def say(name, *args):
        calls.append((name, *args))

    class Logger:
        WARNING = 2

        def __init__(self, severity):
            assert severity == self.WARNING

    class Builder:
        def __init__(self, logger):
            assert isinstance(logger, Logger)

        def create_network(self, flags):
            say('create_network', flags)
            return SimpleNamespace(file=None)

        def create_builder_config(self):
            return SimpleNamespace(
                clear_flag=lambda flag: say('clear_flag', flag),
                add_optimization_profile=lambda profile: say('add_optimization_profile'),
            )

        def create_optimization_profile(self):
            return SimpleNamespace(set_shape=lambda name, *shapes: say('set_shape', name, *shapes))

        def build_serialized_network(self, network, config):
            say('build_serialized_network')
            return memoryview(Path(network.file).read_bytes())

    class OnnxParser:
        num_errors = 1

        def __init__(self, network, logger):
            self.network = network

        def parse_from_file(self, file):
            say('parse_from_file', file)
            self.network.file = file
            return error is None

        def get_error(self, index):
            return error

    class Runtime:
        def __init__(self, logger):
            assert isinstance(logger, Logger)

        def deserialize_cuda_engine(self, data):
            say('deserialize_cuda_engine')
            return Engine(data)

    class Engine:
        def __init__(self, data):
            self.session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
            self.outputs = {value.name: value for value in reversed(self.session.get_outputs())}  # in no order of ours
            self.inputs = {value.name: value for value in self.session.get_inputs()}
            self.num_io_tensors = len(self.inputs) + len(self.outputs)

        def get_tensor_name(self, index):
            return [*self.outputs, *self.inputs][index]

        def get_tensor_mode(self, name):
            return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return {**self.outputs, **self.inputs}[name].type

        def create_execution_context(self):
            return Context(self)

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses, self.allocators = engine, {}, {}, {}

        def set_input_shape(self, name, shape):
            say('set_input_shape', name, shape)
            self.shapes[name] = shape

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def set_output_allocator(self, name, allocator):
            self.allocators[name] = allocator

        def execute_async_v3(self, stream):
            say('execute_async_v3', stream)
            inputs = {
                name: np.frombuffer((ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name]), 'f')
                for name, shape in self.shapes.items()
            }
            inputs = {name: value.reshape(self.shapes[name]) for name, value in inputs.items()}
            values = self.engine.session.run([*self.engine.outputs], inputs)
            for name, value in zip(self.engine.outputs, values, strict=True):
                value = np.ascontiguousarray(spoil(name, value) if spoil else value)
                address = self.allocators[name].reallocate_output_async(name, 0, value.nbytes + 64, 256, stream)
                ctypes.memmove(address, value.ctypes.data, value.nbytes)
                self.allocators[name].notify_shape(name, value.shape)
            return True

    fake = SimpleNamespace(
        Logger=Logger, Builder=Builder, OnnxParser=OnnxParser, Runtime=Runtime, IOutputAllocator=IOutputAllocator,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag, BuilderFlag=BuilderFlag,
        TensorIOMode=TensorIOMode, nptype=NUMPY.__getitem__, __version__='0.fake',
    )  # fmt: skip
    monkeypatch.setitem(__import__('sys').modules, 'tensorrt', fake)
    monkeypatch.setattr(module, 'find_spec', lambda name: name)
    monkeypatch.setattr(module, 'DEVICE', 'cpu')
    monkeypatch.setattr(module.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(module.torch.cuda, 'get_device_name', lambda: 'no GPU')
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: say('synchronize'))
    monkeypatch.setattr(module.torch.cuda, 'Stream', lambda: stream)
    monkeypatch.setattr(module.torch.cuda, 'stream', lambda given: nullcontext())
    return calls


REAL_NAMES = {
    'Logger': ('WARNING',),
    'Builder': (
        'create_network', 'create_builder_config', 'create_optimization_profile', 'build_serialized_network',
    ),
    'IBuilderConfig': ('clear_flag', 'add_optimization_profile'),
    'IOptimizationProfile': ('set_shape',),
    'OnnxParser': ('parse_from_file', 'get_error', 'num_errors'),
    'NetworkDefinitionCreationFlag': ('STRONGLY_TYPED',),
    'BuilderFlag': ('TF32',),
    'TensorIOMode': ('INPUT',),
    'Runtime': ('deserialize_cuda_engine',),
    'ICudaEngine': (
        'num_io_tensors', 'get_tensor_name', 'get_tensor_mode', 'get_tensor_dtype', 'create_execution_context',
    ),
    'IExecutionContext': (
        'set_input_shape', 'set_tensor_address', 'set_output_allocator', 'execute_async_v3',
    ),
    'IOutputAllocator': (),
    'IHostMemory': (),
    'nptype': (),
}  # fmt: skip
"""What tensorrt_engine.py uses, by class: found in the bindings 10.16.1.11 and 11.4.0.106, 2026-11-21."""
