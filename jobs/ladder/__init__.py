"""The ladder climbed and measured: rung after rung of a diffusion pipeline, in cost and in quality; and clocks of a GPU."""
