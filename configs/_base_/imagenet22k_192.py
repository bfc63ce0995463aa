# ImageNet-22K at 192, as published for variants L and XL. The test resizes to int(192 / 0.875).
_base_ = './imagenet22k_224.py'
train_pipeline = _base_.train_pipeline
train_pipeline[1]['scale'] = 192
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 219
test_pipeline[2]['crop_size'] = 192
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
