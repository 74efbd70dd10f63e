"""Access to an NVIDIA GPU: the driver, the compiler, timing, and what every GPU backend shares."""
