"""LoRAs: how they are written and chosen, what their files must be, and switching them beside a loaded pipeline."""
