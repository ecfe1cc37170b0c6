"""What monitors compute from tensors."""
