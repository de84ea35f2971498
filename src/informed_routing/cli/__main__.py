"""`python -m informed_routing.cli`."""

import sys

from . import main

sys.exit(main())
