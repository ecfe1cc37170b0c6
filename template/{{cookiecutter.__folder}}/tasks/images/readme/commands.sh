$run fit --data.folder pictures/                        # your own images: a folder for each class, or train/ and val/ of such
$run fit --config configs/model/vit.yaml                # a vision transformer
$run fit --model.net my_nets.Net --model.net.width 64   # your own network: any nn.Module from images to logits
$run predict --ckpt_path last --data.predict new/       # the classes of the images in a folder
