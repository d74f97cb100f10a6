"""What the three steps of tristage share: data, models, engines, numerics, checkpoints."""

import logging

__version__ = "0.1.0"
# Here and not in quiet_libraries: peft imports bitsandbytes, which on a CPU lists the kernels it could not download.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
