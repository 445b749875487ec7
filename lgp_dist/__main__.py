"""`python -m lgp_dist`, which is what `accelerate launch -m lgp_dist` runs."""

from lgp_dist.cli import main

main()
