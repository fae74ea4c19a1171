"""`python -m millijoule.jobs.bench NAME`."""

import sys

from millijoule.jobs.bench import main

sys.exit(main())
