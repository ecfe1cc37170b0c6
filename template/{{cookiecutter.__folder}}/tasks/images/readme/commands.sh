$run fit --data.folder pictures/                    # your own images: a folder for each class, or train/ and val/ of such
$run predict --ckpt_path last --data.predict new/ --output classes.csv   # the classes of the images in a folder
$run fit --config model/vit                         # a vision transformer
$run fit --model.net my_nets.Net --model.net.width 64   # your own network: any nn.Module from images to logits
