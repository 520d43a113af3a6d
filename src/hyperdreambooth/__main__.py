"""`python -m hyperdreambooth`, and what `torchrun -m hyperdreambooth` starts in every process."""

import sys

from .cli import main

sys.exit(main())
