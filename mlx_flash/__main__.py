"""``python -m mlx_flash``: the same as the console script."""

import sys

from mlx_flash.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
