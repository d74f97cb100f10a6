"""`python -m tristage.launch MODULE CONFIG ...`: what the shell launchers call."""

import sys

from tristage.launch.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
