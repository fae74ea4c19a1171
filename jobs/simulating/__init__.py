"""A fleet on a simulated clock: the product's own driver, and everything it talks to made up."""
