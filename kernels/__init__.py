"""The Triton back end: one file per op, with the raw ops' names and arguments (installed as `diffgan_fast.kernels`)."""
