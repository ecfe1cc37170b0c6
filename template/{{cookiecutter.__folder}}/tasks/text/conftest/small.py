NETWORK = ["--model.net.dim=16", "--model.net.depth=2", "--model.net.heads=2"]
SMALL = [*NETWORK, "--model.context=32", "--data.batch_size=4", "--data.files=corpus/*.txt"]
