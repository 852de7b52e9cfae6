"""What a forward pass says about its samples."""
