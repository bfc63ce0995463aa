_base_ = './demo_upernet_unireplknet_a_digit-scenes.py'
# Ten digits, three to six an image, turned and overlapping:
#   python tools/dataset_preparation/digit_scenes.py --out data/digit_scenes_hard --difficulty hard
data_root, difficulty = 'data/digit_scenes_hard', 'hard'
names = ['background', 'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
palette = [[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180]]
palette += [[70, 240, 240], [240, 50, 230], [170, 255, 195], [170, 110, 40]]
dataset = dict(data_root=data_root, metainfo=dict(classes=names, palette=palette))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
model = dict(decode_head=dict(num_classes=11, loss_decode=dict(class_weight=[0.5] + [1.0] * 10)))
