# PublishedNamesHook lets --cfg-options load_from=FILE and tools/test.py take published classification files.
_base_ = './runtime.py'
custom_hooks = [dict(type='RandomStateHook'), dict(type='PublishedNamesHook')]
