"""What a file of the oscillator generator says that it is; here, so that it can be asked without PyTorch."""

FORMAT = "millijoule-oscillator"
FORMAT_VERSION = "5"
