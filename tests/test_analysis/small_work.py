"""Rows and results that cost nothing."""

from functools import partial

from mmunireplknet.analysis import peers
from mmunireplknet.analysis.benchmark import PUBLISHED, Check, Result, Row
from mmunireplknet.analysis.timing import Timing

from ..test_models.tiny import TINY

MAP = (2, 6, 9, 8)
IMAGE = (1, 3, 64, 64)


def tiny_rows():
    rate = Check('rate', limit=0.01)
    operator = Row(
        '7x7 wgrad', partial(peers.depthwise, MAP, 7, 'wgrad'), (Check('speed-up', ('torch NCHW',), 99), rate)
    )
    checks = (Check('time', ('identity',), 99.0, goal=50.0), Check('memory', PUBLISHED, 0.99))
    training = Row('tiny training', partial(peers.training, TINY, IMAGE), checks)
    sizes = Row(
        'tiny sizes', partial(peers.growth, 'a', IMAGE, (7, 9)), (Check('time', ('K=7',), ours='K=9'),), 1.0, ('K=7',)
    )
    return operator, training, sizes


def result_of(**milliseconds):
    timings = {name: Timing(ms, 0.9 * ms, 1.1 * ms, 5) for name, ms in milliseconds.items()}
    return Result('7x7 work', timings, {'ours': 90.0}, {'ours': 30, 'a': 100, 'b': 60})
