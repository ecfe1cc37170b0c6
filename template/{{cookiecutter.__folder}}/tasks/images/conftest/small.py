NETWORK = "model: {net: {init_args: {widths: [8, 8], depth: 1}}}"  # in a file, because it is for the ResNet only
DATA = ["--data.batch_size=4", "--data.folder=pictures", "--data.size=8"]
SMALL = ["--config=small.yaml", *DATA, "--trainer.check_val_every_n_epoch=1"]
