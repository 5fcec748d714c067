"""How kernels are proven: in interpret mode, by lowering, by compiling ahead of time, and on a GPU."""
