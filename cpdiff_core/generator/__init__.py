"""The paper's contribution (Sec. 3): from harvested LoRA vectors to generated ones.

`normalization` (Sec. 3.2, Tab. 4a) -> `autoencoder` (Eq. 6-7) -> `conditions` (Sec. 3.3, Tab. 4b) with `unet1d`
-> `diffusion` (Eq. 8). `training` is the one loop that fits both networks, `layers` what both are made of.
"""
