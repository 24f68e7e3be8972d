"""Stand-in for torchvision where it is not installed: the transforms that `train_unconditional.py` names."""
