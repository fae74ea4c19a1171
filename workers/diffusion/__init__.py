"""Text-to-image pipelines of diffusers as generators: a folder checked, loaded, and drawn with."""
