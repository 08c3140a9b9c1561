"""Pixels: pictures of every kind to tensors and back, masks, files, and the way into latent space. Knows no prompt, family or request."""
