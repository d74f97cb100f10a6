"""What the three steps of tristage share: data, models, engines, numerics, checkpoints."""

import logging

__version__ = "0.1.0"
# Here, before peft imports it: on a CPU bitsandbytes says at every start which kernels it could not download.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
