NETWORK = ["--model.net.dim=16", "--model.net.depth=2", "--model.net.heads=2"]
SMALL = [*NETWORK, "--data.batch_size=4", "--data.folder=pictures", "--data.size=8"]
