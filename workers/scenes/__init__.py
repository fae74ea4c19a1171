"""The icon domain: scenes, their prompts, and true images of them."""
