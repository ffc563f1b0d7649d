"""`python -m effnet_repro.cli COMMAND ...`"""

import sys

from effnet_repro.cli import main
from effnet_repro.cli.processes import leave

if __name__ == "__main__":
    status = main()
    leave(status)
    sys.exit(status)
