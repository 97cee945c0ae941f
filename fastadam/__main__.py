"""``python -m fastadam`` is the ``fastadam`` command."""

import sys

from fastadam.cli import main

sys.exit(main())
