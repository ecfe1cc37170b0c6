$run fit --data.files houses.csv --data.target price   # your own table, also Parquet: a number or a class to predict
$run predict --ckpt_path last --data.predict new.csv --output prices.csv   # rows without a target
$run fit --config model/mlp                         # another network
$run fit --data.dataset breast_cancer --model.net.dropout 0.3   # a small table, with two classes
$run fit --model.net my_nets.Net --model.net.width 64   # your own network, with arguments numbers, categories and outputs
