NETWORK = ["--model.net.dim=16", "--model.net.depth=2"]
SMALL = [*NETWORK, "--data.batch_size=8", "--data.files=table/*.csv", "--data.target=kind"]
