"""The one table of shapes that the benches run on."""

from __future__ import annotations

# (R, C): a small classifier's batch, a tagger's tokens, a mid-size output, a vocabulary.
DISTILL: list[tuple[int, int]] = [(32, 2), (64, 20), (512, 1000), (256, 30522)]

# (pairs, N, heads, L, L): attention maps of the four layers of a BERT mentee and of its mentor.
MAPS: list[tuple[int, ...]] = [(4, 32, 12, 128, 128)]

# (N, L, H_t, H_s): hidden states of a BERT mentor and its mentee; of MiniLM's and a narrower one.
STATES: list[tuple[int, ...]] = [(32, 128, 768, 768), (32, 128, 384, 192)]

# (B, P, Q): the matrices of a two-layer MiniLM mentee, of a four-layer BERT mentee's attention, and
# of a small vision transformer.
SVD: list[tuple[int, int, int]] = [(8, 384, 384), (2, 1536, 384), (2, 768, 768), (24, 64, 64)]

# (K, n): factors of a 384-wide layer, and of a large one.
PACK: list[tuple[int, int]] = [(32, 3072), (256, 16384)]

# (R, n): rows of a small layer's update, and of a large one's.
RANS: list[tuple[int, int]] = [(100, 3072), (32, 65536)]

# (K, P, Q) of a reconstruction.
PRODUCT: list[tuple[int, int, int]] = [(64, 384, 384), (128, 1536, 384)]

# What keeps a large GPU busy; on a CPU these would take minutes.
DISTILL_LARGE: list[tuple[int, int]] = [(2048, 30522)]
PACK_LARGE: list[tuple[int, int]] = [(1024, 65536)]
RANS_LARGE: list[tuple[int, int]] = [(1024, 65536)]
PRODUCT_LARGE: list[tuple[int, int, int]] = [(256, 4096, 4096)]
