$run fit --model.net.depth 6                        # arguments of the network and of the module are options
$run fit --model.net my_nets.Net --model.net.width 64   # any nn.Module
$run predict --ckpt_path last --output found.csv    # what predict_step returns, a row each; or .jsonl
