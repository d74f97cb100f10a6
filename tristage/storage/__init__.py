"""Files that survive a power cut, named pieces of tensors, free space."""
