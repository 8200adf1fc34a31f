"""`python -m packsft`: the `packsft` command if it is not on the PATH."""

import sys

from packsft.app.cli import main

sys.exit(main())
