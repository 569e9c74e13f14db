"""Base: what every room builds on: the C library, the GPU, files and locks, draws by address, threads."""
