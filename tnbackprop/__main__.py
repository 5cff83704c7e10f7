"""``python -m tnbackprop``."""

import sys

from .cli import main

sys.exit(main())
