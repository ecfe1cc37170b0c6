NETWORK = ["--model.net.dim=16", "--model.net.depth=2"]
SMALL = [*NETWORK, "--data.batch_size=8", "--data.waves=200"]
