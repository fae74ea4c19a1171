"""Our fused modules in the place of diffusers': which there are, where they fit, and putting them there."""
