"""Unlike devices: pools of workers, what each has shown to cost, and which of them are to work."""
