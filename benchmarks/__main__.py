"""`python -m benchmarks`: measures everything that this machine can, in at most eight minutes."""

import sys

from benchmarks.suite import main

sys.exit(main())
