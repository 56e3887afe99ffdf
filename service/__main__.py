"""`python -m service` is `xlora-serve`."""

import sys

from service.cli import main

sys.exit(main())
