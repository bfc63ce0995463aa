_base_ = './demo_upernet_unireplknet_a_digit-scenes.py'
# The same ten digits, smaller, turned further, fainter, and half over one another:
#   python tools/dataset_preparation/digit_scenes.py --out data/digit_scenes_hard --difficulty hard
data_root, difficulty = 'data/digit_scenes_hard', 'hard'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
