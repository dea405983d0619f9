"""What LoRA vectors are generated for. Only this package knows what a BERT or a PixArt is."""
