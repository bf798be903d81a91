"""Tensors <-> entries of a frame: modes, rate control, quantisers, decoders."""
