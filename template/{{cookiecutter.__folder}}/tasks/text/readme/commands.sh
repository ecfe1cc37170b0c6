$run fit --data.files 'corpus/**/*.txt'             # your own text, as bytes; also .jsonl, .parquet, and tokens in .bin
$run fit --data.files a.txt --data.tokenizer gpt2/  # tokens; a folder with tokenizer.json (pip install tokenizers)
$run fit --config model/experts                     # a mixture of experts
$run fit --model.net my_nets.Net --model.net.width 64   # your own network: any nn.Module from tokens to logits
$run predict --ckpt_path last --data.prompts prompts.txt --output texts.jsonl   # a prompt a line; or .jsonl
