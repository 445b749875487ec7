"""A recipe as an argument: its name is a subcommand and its fields are options."""

from typing import Annotated

import tyro

from lgp_dist.recipes import RECIPES

Recipe = Annotated[
    tyro.extras.subcommand_type_from_defaults(  # type: ignore[valid-type]
        {name: recipe() for name, recipe in RECIPES.items()},
        descriptions={name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in RECIPES.items()},
        prefix_names=False,
    ),
    tyro.conf.arg(name=""),
]
