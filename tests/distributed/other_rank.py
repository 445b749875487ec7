"""`lgp` whose rank 1 has further arguments (LGP_TEST_ARGUMENTS) and a folder before all others (LGP_TEST_FOLDER)."""

import os
import sys

if os.environ["RANK"] == "1":
    sys.argv += os.environ["LGP_TEST_ARGUMENTS"].split()
    sys.path.insert(0, os.environ["LGP_TEST_FOLDER"])

from lgp_dist.cli import main

main()
