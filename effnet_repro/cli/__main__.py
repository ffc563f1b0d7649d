"""`python -m effnet_repro.cli COMMAND ...`"""

import sys

from effnet_repro.cli import main

if __name__ == "__main__":
    sys.exit(main())
