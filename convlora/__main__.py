"""`python -m convlora` is the command `convlora`."""

import sys

from convlora.cli import main

sys.exit(main())
