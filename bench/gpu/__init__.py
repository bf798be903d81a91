"""Tests, sanitizers and benches of every CUDA kernel by one command: `python -m bench.gpu`."""
