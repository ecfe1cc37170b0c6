$run fit --data.files 'corpus/**/*.txt'                 # your own text, as bytes; also .jsonl, .parquet, and tokens in .bin
$run fit --data.files a.txt --data.tokenizer gpt2/ --model.net.vocabulary 50257   # a tokenizer.json; pip install tokenizers
$run fit --config configs/model/experts.yaml            # a mixture of experts
$run fit --model.net my_nets.Net --model.net.width 64   # your own network: any nn.Module from bytes to logits
