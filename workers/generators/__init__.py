"""Image models behind one protocol: the product's own, Un-0, diffusers pipelines."""
