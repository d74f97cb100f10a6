"""What the three steps of tristage share: data, models, engines, numerics, checkpoints."""

__version__ = "0.1.0"
