# ImageNet-22K (21,841 classes) at 224 with the augmentation of ImageNet-1K. Published runs evaluate nothing; for a
# validation folder of your own there is the test loader. data/imagenet21k/meta/train.txt saves reading 21,841 folders.
_base_ = './imagenet_224.py'
data_preprocessor = dict(num_classes=21841)
_dataset = dict(type='ImageNet21k', data_root='data/imagenet21k')
train_dataloader = dict(batch_size=32, dataset=_dataset)
val_dataloader = None
val_evaluator = None
test_dataloader = dict(batch_size=32, dataset=dict(**_dataset, split='', data_prefix='val'))
