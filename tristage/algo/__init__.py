"""The mathematics of the three steps: functions of tensors and floats that import torch and nothing else."""
