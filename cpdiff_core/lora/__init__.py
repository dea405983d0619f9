"""The thing that is generated: LoRA vectors, their layout, and many of them through one base at once."""
