"""Styles: LoRA for PixArt's attention, from a style image to vectors to images (Sec. 4.2, Table 2)."""
