NETWORK = ["--model.net.widths=[8,8]", "--model.net.depth=1"]
DATA = ["--data.batch_size=4", "--data.folder=pictures", "--data.size=8"]
SMALL = [*NETWORK, *DATA, "--trainer.check_val_every_n_epoch=1"]
