"""`python -m packsft`: the `packsft` command where it is not on the PATH."""

import sys

from packsft.app.cli import main

sys.exit(main())
