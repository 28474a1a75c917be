"""`python -m convnext_kernels.cli`."""

import sys

from convnext_kernels.cli import main

sys.exit(main())
