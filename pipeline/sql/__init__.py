"""SQL over the energy tables: the questions that have a name, and the engine."""
